//! The CPU back end of Moellon: AVX-512, AVX2, NEON and portable kernels.
