//! `moellon calibrate`, `prune`, `recalibrate`, `plan`, `quantize` and `compare`: the commands that make and judge demolished models.

mod calibrate;
mod compare;
pub mod options;
mod plan;
mod prune;
mod quantize;
mod recalibrate;
mod reporter;
mod texts;

pub use calibrate::run as calibrate;
pub use compare::run as compare;
pub use plan::run as plan;
pub use prune::run as prune;
pub use quantize::run as quantize;
pub use recalibrate::run as recalibrate;

use crate::backend;
use crate::cli::{ActivationsChoice, DeviceOptions};
use anyhow::Result;
use moellon_ops::Backend;

/// Makes a fresh exact back end whenever a part of a model is loaded. The first one is made here, so that a flag that asks
/// for what this machine does not have is refused with its own message.
pub fn backends(device: &DeviceOptions) -> Result<impl FnMut() -> moellon_ops::Result<Box<dyn Backend>> + '_> {
    let mut first = Some(backend::create(device, ActivationsChoice::Exact)?);
    Ok(move || match first.take() {
        Some(backend) => Ok(backend),
        None => backend::create(device, ActivationsChoice::Exact).map_err(|e| moellon_ops::Error::Contract {
            op: "back end",
            what: "start of another one".to_owned(),
            found: format!("{e:#}"),
            expected: "a start as the first".to_owned(),
        }),
    })
}
