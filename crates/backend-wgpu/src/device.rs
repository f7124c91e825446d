//! An adapter behind a safe surface: which there are, opening one, its self-test, memory and pipelines.
//!
//! Contains `unsafe` because wgpu's checks inside kernels (bounds of every access, bounded loops, divisors) are left out: they cost a third of the
//! instructions of a product. What they would catch is caught before: `validate()` of every operation checks shapes against buffers,
//! loading checks weights, and conformance runs every kernel.
#![allow(unsafe_code)]

mod adapters;
mod cache;
mod matrices;

pub use self::adapters::{AdapterChoice, AdapterKind, AdapterReport, adapters};
use self::adapters::{enumerate, kind_of, report};
use self::cache::KernelCache;

use crate::inputs::Inputs;
use crate::kernels::{Kernel, Matrices, SHARED_LANES, Source, TOKENS, Target};
use crate::stream::Stream;
use crate::vulkan::{self, Vulkan};
use moellon_ops::{Error, Result, Stage};
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The name of this back end in messages.
pub(crate) const NAME: &str = "wgpu";
/// Bytes of immediates that every kernel may use; Vulkan guarantees as many.
pub(crate) const IMMEDIATES_BYTES: u32 = 128;
/// How long the host asks for a result again and again before it sleeps.
const SPIN: Duration = Duration::from_millis(1);
/// Bindings of the kernel that has most of all.
const MOST_STORAGE_BUFFERS: u32 = 16;

/// Invocations of the kernel that has most of them.
const MOST_INVOCATIONS: u32 = 256 + SHARED_LANES as u32;

pub(crate) fn device_error(message: impl Into<String>) -> Error {
    Error::Device { backend: NAME, message: message.into() }
}

/// What an adapter does where WGSL leaves it a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SelfTest {
    /// Binary16 subnormals survive `unpack2x16float`: small codes are decoded with it, else with integers.
    pub half_subnormals: bool,
    /// f32 subnormals survive arithmetic. Nothing needs them.
    pub single_subnormals: bool,
    /// `fma` rounds once.
    pub fused: bool,
    /// Smallest and largest subgroup.
    pub subgroup_sizes: [u32; 2],
    /// Any 32 invocations in a row from a multiple of 32 can exchange values: sums of teams go through registers, else through workgroup
    /// memory.
    pub subgroups: bool,
    /// Activations become integers for products with integer codes: where shaders are compiled to an instruction that multiplies four bytes.
    pub integer_products: bool,
    /// Whether the adapter has f16 arithmetic.
    pub shader_f16: bool,
    /// Whether the adapter has cooperative matrices of any kind.
    pub cooperative_matrix: bool,
    /// Whether those of 16 by 16 f16 numbers, summed in f32, are there, and sums of integers in them are exact: then they multiply heads of
    /// prompts.
    pub exact_matrices: bool,
}

/// Opens an adapter and tests it.
///
/// # Errors
/// [`Error::Device`] in one line: no such adapter, what it lacks, a self-test that it fails.
pub fn self_test(choice: AdapterChoice) -> Result<SelfTest> {
    Device::open(choice, None, true).map(|device| device.self_test)
}

/// Memory of the device. Clones are the same memory.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    pub(crate) buffer: wgpu::Buffer,
    /// Where it starts in the buffer, which it may share with others.
    pub(crate) offset: u64,
    pub(crate) id: u64,
    pub(crate) bytes: u64,
}

/// A buffer of many weights. wgpu looks at every buffer of a step when the step is encoded and again when it is submitted: a model of
/// hundreds of weights would cost more than the dispatches.
struct Arena {
    buffer: wgpu::Buffer,
    used: u64,
}

/// A kernel, compiled by whoever launches it.
#[derive(Clone)]
pub(crate) enum Compiled {
    Wgpu(wgpu::ComputePipeline),
    #[cfg_attr(target_vendor = "apple", allow(dead_code))] // There is no Vulkan to read it.
    Vulkan(Arc<vulkan::Pipeline>),
}

impl Compiled {
    #[cfg_attr(target_vendor = "apple", allow(dead_code))]
    pub(crate) fn vulkan(&self) -> Option<&Arc<vulkan::Pipeline>> {
        match self {
            Compiled::Vulkan(pipeline) => Some(pipeline),
            Compiled::Wgpu(_) => None,
        }
    }
}

/// A compiled kernel.
#[derive(Clone)]
pub(crate) struct Pipeline {
    pub(crate) name: Arc<str>,
    pub(crate) kernel: Compiled,
    pub(crate) read_write: u32,
    pub(crate) read: u32,
}

/// The memories bound for a kernel, and how wgpu has them where it launches it.
#[derive(Clone)]
pub(crate) struct Bound {
    pub(crate) group: Option<wgpu::BindGroup>,
    pub(crate) memories: Arc<[Memory]>,
}

struct Layout {
    bindings: wgpu::BindGroupLayout,
    pipeline: wgpu::PipelineLayout,
}

/// An open adapter.
pub(crate) struct Device {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) report: AdapterReport,
    pub(crate) self_test: SelfTest,
    layouts: HashMap<(u32, u32), Layout>,
    pipelines: HashMap<Kernel, Pipeline>,
    bind_groups: HashMap<(u32, u32, Vec<u64>), Bound>,
    /// Whose kernels and commands are used, where it is below wgpu.
    pub(crate) vulkan: Option<Vulkan>,
    /// wgpu has writes that wait for its next submission.
    has_writes: Cell<bool>,
    /// The host writes weights where the adapter reads them.
    pub(crate) shares_memory: bool,
    /// Who multiplies tiles for prompts, if anybody does.
    pub(crate) matrices: Option<Matrices>,
    /// Kernels may have as many bindings as those have that do several operations at once.
    pub(crate) binds_many: bool,
    /// A workgroup that counted others as done sees what they wrote: barriers of storage reach the whole device, and there is memory that no
    /// cache hides. Metal's barriers reach one workgroup.
    pub(crate) orders_memory: bool,
    arena: Option<Arena>,
    /// Bytes of all arenas.
    arena_bytes: u64,
    next_memory: u64,
    /// Small buffers of numbers, which the host writes before every step.
    pub(crate) inputs: RefCell<Inputs>,
    /// Time that compiling took.
    compile_time: Duration,
    /// What the driver said outside of any call that could return it.
    failure: Arc<Mutex<Option<String>>>,
    cache: Option<KernelCache>,
}

impl Device {
    /// Opens an adapter and tests it; `with_vulkan`: where it is Vulkan's, kernels and commands are Vulkan's own.
    pub(crate) fn open(choice: AdapterChoice, cache_folder: Option<&Path>, with_vulkan: bool) -> Result<Self> {
        let mut all = enumerate();
        if !choice.allow_software {
            all.retain(|adapter| kind_of(&adapter.get_info()) != AdapterKind::Software);
        }
        if all.is_empty() {
            return Err(device_error("no adapter: neither Vulkan, Metal nor DX12 has one"));
        }
        if choice.ordinal >= all.len() {
            let names: Vec<String> = all.iter().map(|a| a.get_info().name).collect();
            return Err(device_error(format!(
                "adapter {} does not exist, there are {}: {}",
                choice.ordinal,
                all.len(),
                names.join("; ")
            )));
        }
        let adapter = all.swap_remove(choice.ordinal);
        let report = report(&adapter);
        if !report.lacks.is_empty() {
            return Err(device_error(format!("adapter {} lacks {}", report.name, report.lacks.join("; "))));
        }
        let mut opened = Self::request(&adapter, report.clone(), with_vulkan)?;
        opened.open_cache(&adapter.get_info(), cache_folder)?;
        opened.run_self_test()?;
        if matrices::are_there(&opened, &adapter) {
            // A driver that cannot compile such a kernel loses the device with it: the test has one of its own.
            let mut tried = Self::request(&adapter, report, with_vulkan)?;
            tried.self_test = opened.self_test;
            opened.self_test.exact_matrices = matrices::are_exact(&mut tried).unwrap_or(false);
            opened.matrices = opened.self_test.exact_matrices.then_some(Matrices::Cooperative);
        }
        Ok(opened)
    }

    /// A device of an adapter, with all features that are of use.
    fn request(adapter: &wgpu::Adapter, report: AdapterReport, with_vulkan: bool) -> Result<Self> {
        let features = adapter.features();
        let wanted = wgpu::Features::PIPELINE_CACHE
            | wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::SUBGROUP
            | wgpu::Features::MAPPABLE_PRIMARY_BUFFERS
            | wgpu::Features::SHADER_F16
            | wgpu::Features::MEMORY_DECORATION_COHERENT
            | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        let required_features = wgpu::Features::IMMEDIATES | (features & wanted);
        // SAFETY: the only experimental feature that is asked for is cooperative matrices, where the adapter has them. What may go wrong with
        // them is a wrong result, for which the self-test looks; one kernel uses them, on memory whose bounds it checks.
        let experimental_features = unsafe { wgpu::ExperimentalFeatures::enabled() };
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("moellon"),
            required_features,
            required_limits: adapter.limits(),
            experimental_features,
            memory_hints: wgpu::MemoryHints::Performance,
            ..Default::default()
        }))
        .map_err(|e| device_error(format!("adapter {} does not open: {}", report.name, one_line(&e))))?;
        let failure = Arc::new(Mutex::new(None));
        let sink = Arc::clone(&failure);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let mut failure = sink.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            failure.get_or_insert_with(|| one_line(&error));
        }));
        let info = adapter.get_info();
        let self_test = SelfTest {
            half_subnormals: false,
            single_subnormals: false,
            fused: false,
            subgroup_sizes: [info.subgroup_min_size, info.subgroup_max_size],
            subgroups: false,
            // Metal has no such instruction: there it would be a dozen others.
            integer_products: info.backend != wgpu::Backend::Metal,
            shader_f16: features.contains(wgpu::Features::SHADER_F16),
            cooperative_matrix: features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
            exact_matrices: false,
        };
        let is_shared = matches!(report.kind, AdapterKind::Integrated | AdapterKind::Software);
        let shares_memory = is_shared && features.contains(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS);
        let is_software = report.kind == AdapterKind::Software;
        let vulkan = if with_vulkan { Vulkan::below(&device, is_software)? } else { None };
        Ok(Device {
            device,
            queue,
            vulkan,
            has_writes: Cell::new(false),
            report,
            self_test,
            layouts: HashMap::new(),
            pipelines: HashMap::new(),
            bind_groups: HashMap::new(),
            shares_memory,
            matrices: None,
            binds_many: adapter.limits().max_storage_buffers_per_shader_stage >= MOST_STORAGE_BUFFERS
                && adapter.limits().max_compute_invocations_per_workgroup >= MOST_INVOCATIONS,
            orders_memory: info.backend == wgpu::Backend::Vulkan
                && features.contains(wgpu::Features::MEMORY_DECORATION_COHERENT),
            arena: None,
            arena_bytes: 0,
            next_memory: 0,
            inputs: RefCell::default(),
            compile_time: Duration::ZERO,
            failure,
            cache: None,
        })
    }

    /// Bytes that one binding can have.
    pub(crate) fn max_binding_bytes(&self) -> u64 {
        self.report.max_binding_bytes
    }

    /// Rows of activations that there are kernels of products for. A CPU that plays a GPU spends more on compiling kernels than it ever
    /// saves by having many.
    pub(crate) fn tokens(&self) -> &'static [usize] {
        if self.report.kind == AdapterKind::Software { &[1, 4] } else { &TOKENS }
    }

    /// Keeps what went wrong until somebody asks.
    pub(crate) fn fail(&self, error: &Error) {
        let mut failure = self.failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        failure.get_or_insert_with(|| one_line(error));
    }

    /// What went wrong since the last question, if anything.
    pub(crate) fn check(&self) -> Result<()> {
        let mut failure = self.failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        failure.take().map_or(Ok(()), |message| Err(device_error(message)))
    }

    /// Runs `make` and turns what wgpu says about it into an error.
    fn scoped<T>(&self, what: &str, make: impl FnOnce(&wgpu::Device) -> T) -> Result<T> {
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let made = make(&self.device);
        let errors = [validation, internal, memory].map(|scope| pollster::block_on(scope.pop()));
        match errors.into_iter().flatten().next() {
            Some(error) => Err(device_error(format!("{what}: {}", one_line(&error)))),
            None => Ok(made),
        }
    }

    /// Memory of at least `bytes`, zeroed.
    pub(crate) fn alloc(&mut self, what: &str, bytes: u64) -> Result<Memory> {
        self.alloc_for(what, bytes, wgpu::BufferUsages::empty())
    }

    /// Memory of at least `bytes` for numbers, zeroed: small ones lie side by side, so that what the host writes to them before a step is
    /// one copy.
    pub(crate) fn alloc_numbers(&mut self, what: &str, bytes: u64) -> Result<Memory> {
        let inputs = self.inputs.get_mut();
        if inputs.is_full_for(bytes) {
            return self.alloc(what, bytes);
        }
        if self.inputs.get_mut().buffer.is_none() {
            let all = self.alloc("numbers", Inputs::BYTES)?;
            self.inputs.get_mut().buffer = Some(all.buffer);
            let upload = || {
                self.scoped("numbers on their way", |device| {
                    device.create_buffer(&wgpu::BufferDescriptor {
                        label: None,
                        size: Inputs::BYTES,
                        usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
                        mapped_at_creation: true,
                    })
                })
            };
            let uploads = [upload()?, upload()?];
            self.inputs.get_mut().upload_through(uploads);
        }
        self.next_memory += 1;
        let id = self.next_memory;
        let (buffer, offset, bytes) = self.inputs.get_mut().take(id, bytes);
        Ok(Memory { buffer, offset, id, bytes })
    }

    /// Writes to memory before everything that is submitted from now on.
    pub(crate) fn write(&self, to: &Memory, at: u64, bytes: &[u8]) {
        if !self.inputs.borrow_mut().write(to, at, bytes) {
            self.queue.write_buffer(&to.buffer, to.offset + at, bytes);
            self.has_writes.set(true);
        }
    }

    /// Hands commands of wgpu to the adapter, and what was written before them.
    pub(crate) fn submit(&self, commands: impl IntoIterator<Item = wgpu::CommandBuffer>) -> wgpu::SubmissionIndex {
        self.inputs.borrow_mut().flush(&self.queue);
        self.has_writes.set(false);
        self.queue.submit(commands)
    }

    /// Hands what was written to the adapter, before commands that are not wgpu's. `but_inputs`: those numbers go another way.
    pub(crate) fn submit_writes(&self, but_inputs: bool) {
        if self.has_writes.get() || !but_inputs && self.inputs.borrow().has_written() {
            self.submit([]);
        }
    }

    /// Waits until a submission has run.
    pub(crate) fn wait_for(&self, index: wgpu::SubmissionIndex) -> Result<()> {
        let wait = wgpu::PollType::Wait { submission_index: Some(index), timeout: None };
        let waited = self.device.poll(wait).map(|_| ());
        waited.map_err(|e| device_error(format!("waiting for the adapter: {}", one_line(&e))))
    }

    /// Memory of at least `bytes` that is filled once and then only read. Where host and device share memory the host writes it through the view, and has to
    /// unmap it then: no other memory is used on the way.
    pub(crate) fn alloc_to_fill(&mut self, what: &str, bytes: u64) -> Result<(Memory, Option<wgpu::BufferViewMut>)> {
        if !self.shares_memory {
            return Ok((self.alloc_in_arena(what, bytes)?, None));
        }
        let memory = self.alloc_for(what, bytes, wgpu::BufferUsages::MAP_WRITE)?;
        let view = memory.buffer.get_mapped_range_mut(..);
        let view = view.map_err(|e| device_error(format!("mapping memory for {what}: {}", one_line(&e))))?;
        Ok((memory, Some(view)))
    }

    /// Memory of at least `bytes` that kernels only read, beside others in one buffer.
    fn alloc_in_arena(&mut self, what: &str, bytes: u64) -> Result<Memory> {
        const SMALLEST: u64 = 16 << 20;
        /// Of all starts of bindings, on any adapter.
        const ALIGNMENT: u64 = 256;
        let bytes = bytes.max(16).next_multiple_of(16);
        self.check_binding(what, bytes)?;
        let fits = |arena: &Arena| arena.used + bytes <= arena.buffer.size();
        if !self.arena.as_ref().is_some_and(fits) {
            // Arenas grow with the model, so that a small one does not take much more than it needs.
            let largest = (2 << 30).min(self.device.limits().max_buffer_size / ALIGNMENT * ALIGNMENT);
            let size = self.arena_bytes.clamp(SMALLEST, largest).max(bytes);
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
            let make = |size: u64| {
                self.scoped(&format!("{size} bytes for {what} and more"), |device| {
                    device.create_buffer(&wgpu::BufferDescriptor {
                        label: None,
                        size,
                        usage,
                        mapped_at_creation: false,
                    })
                })
            };
            // Where there is no room for so many, there may be for this weight.
            let buffer = make(size).or_else(|error| if size > bytes { make(bytes) } else { Err(error) })?;
            self.arena_bytes += buffer.size();
            self.arena = Some(Arena { buffer, used: 0 });
        }
        let arena = self.arena.as_mut().expect("made above");
        let offset = arena.used;
        arena.used = (offset + bytes).next_multiple_of(ALIGNMENT);
        self.next_memory += 1;
        Ok(Memory { buffer: arena.buffer.clone(), offset, id: self.next_memory, bytes })
    }

    /// Kernels bind whole memories.
    fn check_binding(&self, what: &str, bytes: u64) -> Result<()> {
        if bytes <= self.max_binding_bytes() {
            return Ok(());
        }
        Err(Error::OutOfMemory {
            backend: NAME,
            what: format!("{what}, in one buffer of this adapter,"),
            needed_bytes: bytes,
            free_bytes: self.max_binding_bytes(),
        })
    }

    fn alloc_for(&mut self, what: &str, bytes: u64, more: wgpu::BufferUsages) -> Result<Memory> {
        // Kernels bind whole buffers; an empty one cannot be bound.
        let bytes = bytes.max(16).next_multiple_of(16);
        self.check_binding(what, bytes)?;
        let usage = more | wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let mapped_at_creation = more.contains(wgpu::BufferUsages::MAP_WRITE);
        let buffer = self.scoped(&format!("{bytes} bytes for {what}"), |device| {
            device.create_buffer(&wgpu::BufferDescriptor { label: None, size: bytes, usage, mapped_at_creation })
        })?;
        if self.vulkan.is_some() && !mapped_at_creation {
            // wgpu zeroes memory before the first commands of its own that read it, which may be later than those that fill it.
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.clear_buffer(&buffer, 0, None);
            self.queue.submit([encoder.finish()]);
        }
        self.next_memory += 1;
        Ok(Memory { buffer, offset: 0, id: self.next_memory, bytes })
    }

    /// Forgets what was bound together with some memory, so that dropping it frees it.
    pub(crate) fn forget(&mut self, memory: &Memory) {
        self.inputs.get_mut().give_back(memory);
        self.bind_groups.retain(|(_, _, ids), _| !ids.contains(&memory.id));
    }

    /// The memories bound for a kernel; made once.
    pub(crate) fn bind(&mut self, pipeline: &Pipeline, memories: &[&Memory]) -> Bound {
        if self.vulkan.is_some() {
            return Bound { group: None, memories: memories.iter().map(|memory| (*memory).clone()).collect() };
        }
        let key = (pipeline.read_write, pipeline.read, memories.iter().map(|m| m.id).collect::<Vec<_>>());
        if let Some(group) = self.bind_groups.get(&key) {
            return group.clone();
        }
        let entries: Vec<wgpu::BindGroupEntry<'_>> = (0..)
            .zip(memories)
            .map(|(binding, memory)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: &memory.buffer,
                    offset: memory.offset,
                    size: wgpu::BufferSize::new(memory.bytes),
                }),
            })
            .collect();
        let layout = &self.layouts[&(pipeline.read_write, pipeline.read)].bindings;
        let group =
            self.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
        let bound = Bound { group: Some(group), memories: memories.iter().map(|memory| (*memory).clone()).collect() };
        self.bind_groups.insert(key, bound.clone());
        bound
    }

    /// A kernel, compiled if it was not yet.
    pub(crate) fn pipeline(&mut self, kernel: Kernel) -> Result<Pipeline> {
        if let Some(pipeline) = self.pipelines.get(&kernel) {
            return Ok(pipeline.clone());
        }
        let started = Instant::now();
        let target = Target {
            half_subnormals: self.self_test.half_subnormals,
            subgroups: self.self_test.subgroups,
            integers: self.self_test.integer_products,
            matrices: self.matrices,
        };
        let source = kernel.source(target);
        let compiled = self.compile(&source)?;
        self.compile_time += started.elapsed();
        self.pipelines.insert(kernel, compiled.clone());
        Ok(compiled)
    }

    /// How many kernels were compiled, and how long that took.
    pub(crate) fn compiled(&self) -> (usize, Duration) {
        (self.pipelines.len(), self.compile_time)
    }

    fn compile(&mut self, source: &Source) -> Result<Pipeline> {
        let kernel = match &self.vulkan {
            Some(vulkan) => Compiled::Vulkan(Arc::new(vulkan.compile(&source.wgsl, source.read_write + source.read)?)),
            None => Compiled::Wgpu(self.compile_by_wgpu(source)?),
        };
        Ok(Pipeline { name: source.name.as_str().into(), kernel, read_write: source.read_write, read: source.read })
    }

    fn compile_by_wgpu(&mut self, source: &Source) -> Result<wgpu::ComputePipeline> {
        let key = (source.read_write, source.read);
        if !self.layouts.contains_key(&key) {
            let layout = self.make_layout(source)?;
            self.layouts.insert(key, layout);
        }
        let layout = &self.layouts[&key];
        let cache = self.cache.as_ref().and_then(|cache| cache.wgpu.as_ref());
        self.scoped(&format!("kernel {}", source.name), |device| {
            let descriptor = wgpu::ShaderModuleDescriptor {
                label: Some(&source.name),
                source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(&source.wgsl)),
            };
            // SAFETY: see the top of this file; every loop of the kernels counts to a bound, every divisor is a shape that `validate()`
            // has seen to be positive.
            let module =
                unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&source.name),
                layout: Some(&layout.pipeline),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Every kernel writes its workgroup memory before it reads it.
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache,
            })
        })
    }

    fn make_layout(&self, source: &Source) -> Result<Layout> {
        let entries: Vec<wgpu::BindGroupLayoutEntry> = (0..source.read_write + source.read)
            .map(|binding| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: binding >= source.read_write },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        self.scoped(&format!("bindings of kernel {}", source.name), |device| {
            let bindings =
                device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
            let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&bindings)],
                immediate_size: IMMEDIATES_BYTES,
            });
            Layout { bindings, pipeline }
        })
    }

    /// Waits until everything submitted has run.
    pub(crate) fn wait(&self) -> Result<()> {
        wait(&self.device)?;
        self.check()
    }

    /// Waits and copies `bytes` bytes of a buffer that the host may map, from its start.
    pub(crate) fn map_read(&self, staging: &wgpu::Buffer, dst: &mut [u8]) -> Result<()> {
        let slice = staging.slice(..dst.len() as u64);
        let mapped = Arc::new(Mutex::new(None));
        let sink = Arc::clone(&mapped);
        slice.map_async(wgpu::MapMode::Read, move |result| {
            *sink.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(result);
        });
        // Being woken takes tens of microseconds. Where the adapter is a CPU it needs this one's.
        let started = Instant::now();
        let is_mapped = || mapped.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_some();
        while self.report.kind != AdapterKind::Software && started.elapsed() < SPIN && !is_mapped() {
            let polled = self.device.poll(wgpu::PollType::Poll);
            polled.map_err(|e| device_error(format!("waiting for the adapter: {}", one_line(&e))))?;
        }
        if is_mapped() {
            self.check()?;
        } else {
            self.wait()?;
        }
        let result = mapped.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        match result {
            Some(Ok(())) => {}
            Some(Err(e)) => return Err(device_error(format!("reading memory back: {}", one_line(&e)))),
            None => return Err(device_error("reading memory back: the adapter did not answer")),
        }
        let range =
            slice.get_mapped_range().map_err(|e| device_error(format!("reading memory back: {}", one_line(&e))))?;
        dst.copy_from_slice(&range);
        drop(range);
        staging.unmap();
        Ok(())
    }

    fn run_self_test(&mut self) -> Result<()> {
        let memory = self.alloc("the self-test", 64)?;
        let inputs: [u32; 16] = [
            0,
            0,
            0,
            0,
            0x0200,                            // 2^-15, binary16 subnormal
            0x0080_0000,                       // 2^-126
            0.5f32.to_bits(),                  // times that: 2^-127
            0x0000_0001,                       // the smallest f32
            (1.0f32 + f32::EPSILON).to_bits(), // (1 + e)^2 - (1 + 2 e) = e^2, lost if the product is rounded
            (1.0f32 + f32::EPSILON).to_bits(),
            (-(1.0f32 + 2.0 * f32::EPSILON)).to_bits(),
            0,
            0,
            0,
            0,
            0,
        ];
        self.write(&memory, 0, bytemuck::cast_slice(&inputs));
        let mut words = [0u32; 4];
        self.run_alone(Kernel::SelfTest, &memory, &mut words)?;
        let half = f32::from_bits(words[0]);
        if half != 0.0 && half != 2f32.powi(-15) {
            return Err(device_error(format!(
                "adapter {} fails its self-test: binary16 2^-15 is {half:e}",
                self.report.name
            )));
        }
        self.self_test.half_subnormals = half != 0.0;
        self.self_test.single_subnormals = words[1] == 0x0040_0000 && words[2] == 1;
        self.self_test.fused = f32::from_bits(words[3]) == f32::EPSILON * f32::EPSILON;
        self.forget(&memory);
        if self.device.features().contains(wgpu::Features::SUBGROUP) && self.self_test.subgroup_sizes[0] >= 32 {
            let memory = self.alloc("the self-test", 1024)?;
            let mut holds = [0u32; 256];
            self.run_alone(Kernel::SubgroupTest, &memory, &mut holds)?;
            self.self_test.subgroups = holds.iter().all(|holds| *holds == 1);
            self.forget(&memory);
        }
        Ok(())
    }

    /// Runs a workgroup of a kernel all of whose bindings are one memory, and reads what it wrote there.
    fn run_alone(&mut self, kernel: Kernel, memory: &Memory, words: &mut [u32]) -> Result<()> {
        let pipeline = self.pipeline(kernel)?;
        let bound = self.bind(&pipeline, &vec![memory; pipeline.read_write as usize]);
        let mut stream = Stream::default();
        stream.push(&pipeline, bound, &[], [1; 3], Stage::Embed, self);
        stream.download(memory, 0, bytemuck::cast_slice_mut(words), self)
    }

    /// Memory that the host can read.
    pub(crate) fn staging(&self, bytes: u64) -> Result<wgpu::Buffer> {
        self.scoped("memory for reading back", |device| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: bytes.next_multiple_of(16),
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })
    }
}

/// Waits until everything submitted to a device has run.
pub(crate) fn wait(device: &wgpu::Device) -> Result<()> {
    device
        .poll(wgpu::PollType::wait_indefinitely())
        .map(|_| ())
        .map_err(|e| device_error(format!("waiting for the adapter: {}", one_line(&e))))
}

/// An error's text in one line, its causes behind colons.
fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
