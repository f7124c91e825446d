//! Checkpoints of Mixture-of-Experts models: sharded safetensors, HF and MLX layouts, configs.
