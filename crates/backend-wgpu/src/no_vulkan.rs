//! `vulkan.rs` where there is none: on Macs. Nothing of this can be made.

use crate::device::Memory;
use crate::stream::Dispatch;
use moellon_ops::Result;

pub(crate) enum Pipeline {}

pub(crate) enum Commands {}

pub(crate) enum Mapped {}

impl Mapped {
    pub(crate) fn write(&mut self, _: usize, _: &[u8]) -> Result<()> {
        match *self {}
    }

    pub(crate) fn read(&self, _: &mut [u8]) -> Result<()> {
        match *self {}
    }

    pub(crate) fn bytes(&self) -> usize {
        match *self {}
    }
}

pub(crate) enum Stamps {}

impl Stamps {
    pub(crate) fn read(&self, _: usize) -> Result<Vec<u64>> {
        match *self {}
    }
}

#[allow(dead_code)] // Read where there is Vulkan.
pub(crate) struct Program<'a> {
    pub(crate) copy_in: Option<(&'a Mapped, &'a wgpu::Buffer, &'a [(usize, usize)])>,
    pub(crate) dispatches: &'a [Dispatch],
    pub(crate) stamps: Option<(&'a Stamps, &'a [usize])>,
    pub(crate) copy_out: Option<(&'a Memory, u64, &'a Mapped, u64)>,
}

pub(crate) enum Vulkan {}

impl Vulkan {
    pub(crate) fn below(_: &wgpu::Device, _: bool) -> Result<Option<Vulkan>> {
        Ok(None)
    }

    pub(crate) fn open_cache(&mut self, _: Option<&[u8]>) -> Result<()> {
        match *self {}
    }

    pub(crate) fn compiled(&self) -> Option<Vec<u8>> {
        match *self {}
    }

    pub(crate) fn compile(&self, _: &str, _: u32) -> Result<Pipeline> {
        match *self {}
    }

    pub(crate) fn map(&self, _: usize, _: bool) -> Result<Mapped> {
        match *self {}
    }

    pub(crate) fn stamps(&self, _: usize) -> Result<Stamps> {
        match *self {}
    }

    pub(crate) fn record(&self, _: &Program<'_>) -> Result<Commands> {
        match *self {}
    }

    pub(crate) fn submit(&self, _: &[&Commands]) -> Result<()> {
        match *self {}
    }

    pub(crate) fn wait(&self) -> Result<()> {
        match *self {}
    }
}
