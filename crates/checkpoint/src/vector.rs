//! Norms, biases and other small float tensors, as f32.

use crate::{Checkpoint, Result, TensorView};

impl Checkpoint {
    /// The tensor `name` of shape `[len]` as f32 (exact from F32, F16 and BF16).
    ///
    /// # Errors
    /// If it is missing, not a float, of another shape, or has a value that is NaN or infinite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        floats(&self.require(name)?, &[len])
    }

    /// As [`Checkpoint::vector`], `None` if it is missing.
    ///
    /// # Errors
    /// As [`Checkpoint::vector`], but for a missing tensor.
    pub fn vector_opt(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        self.tensor(name).map(|tensor| floats(&tensor, &[len])).transpose()
    }
}

/// The values of a float tensor of that shape.
pub(crate) fn floats(tensor: &TensorView<'_>, shape: &[usize]) -> Result<Vec<f32>> {
    let dtype = tensor.expect_float()?;
    tensor.expect_shape(shape)?;
    let mut values = vec![0.0; tensor.bytes.len() / dtype.size_bytes()];
    dtype.read_slice(tensor.bytes, 0, &mut values);
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(tensor.wrong(format!("value {at}"), values[at], "a finite number")),
        None => Ok(values),
    }
}
