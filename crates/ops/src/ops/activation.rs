//! The function between the gate and up projections and the down projection.

/// `h = f(gate, up)`, elementwise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `silu(gate) * up` (Llama, GLM, DeepSeek, Qwen, Mixtral).
    SwiGlu,
    /// `(up' + 1) * gate' * sigmoid(alpha * gate')` with `gate' = min(gate, limit)`, `up'` clamped to `[-limit, limit]`
    /// (gpt-oss; alpha 1.702, limit 7).
    ClampedSwiGlu {
        /// Slope of the sigmoid.
        alpha: f32,
        /// Where gate and up are cut.
        limit: f32,
    },
}

impl Activation {
    /// The reference, in f64.
    pub fn apply(self, gate: f32, up: f32) -> f32 {
        let (gate, up) = (f64::from(gate), f64::from(up));
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        (match self {
            Activation::SwiGlu => gate * sigmoid(gate) * up,
            Activation::ClampedSwiGlu { alpha, limit } => {
                let (gate, up) = (gate.min(f64::from(limit)), up.clamp(-f64::from(limit), f64::from(limit)));
                (up + 1.0) * gate * sigmoid(f64::from(alpha) * gate)
            }
        }) as f32
    }
}
