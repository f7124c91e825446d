//! The Vulkan below wgpu: kernels and commands of its own, which can be submitted again and again.
//!
//! wgpu encodes a step's dispatches anew for every token, looks through all that they bind, and chains submissions by semaphores: 6 % of a step
//! of 2.7 ms on an H200. Vulkan's commands are recorded once, with barriers only where a dispatch reads or writes what another wrote, and a
//! token is one call of the driver. Memory stays wgpu's: it opens the adapter, makes and zeroes buffers and fills them.
//!
//! Contains `unsafe` because Vulkan is a C interface. What it asks for is kept here: kernels are valid to naga, and have the bindings and
//! immediates of their layout; [`Commands`] hold on to the buffers and kernels that they name; nothing is destroyed or written by the host before
//! the fences of all submissions; a full barrier at both ends of every submission orders it with those before and behind it in the one
//! queue, wgpu's too. wgpu never zeroes what these kernels wrote, because its own copy of zeros to every buffer comes first (`device.rs`).
#![allow(unsafe_code)]

use crate::device::{IMMEDIATES_BYTES, Memory, device_error};
use crate::stream::Dispatch;
use ash::vk;
use moellon_ops::Result;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the host asks for a fence again and again before it sleeps: being woken takes tens of microseconds.
const SPIN: Duration = Duration::from_millis(20);

fn failed(what: &'static str) -> impl FnOnce(vk::Result) -> moellon_ops::Error {
    move |error| device_error(format!("Vulkan, {what}: {error}"))
}

/// What all commands need.
struct Shared {
    raw: ash::Device,
    queue: vk::Queue,
    family: u32,
    memory_types: Vec<vk::MemoryType>,
    fences: Mutex<Fences>,
    /// How long to ask for a fence.
    spin: Duration,
    /// Keeps `raw` alive.
    _device: wgpu::Device,
}

/// A fence each submission.
#[derive(Default)]
struct Fences {
    running: Vec<vk::Fence>,
    free: Vec<vk::Fence>,
}

impl Shared {
    fn fences(&self) -> MutexGuard<'_, Fences> {
        self.fences.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for all submissions.
    fn wait(&self) -> Result<()> {
        let mut fences = self.fences();
        while let Some(fence) = fences.running.last().copied() {
            let started = Instant::now();
            let mut done = false;
            // SAFETY: the fence is ours, and was submitted.
            unsafe {
                while !done && started.elapsed() < self.spin {
                    std::thread::yield_now();
                    done = self.raw.get_fence_status(fence).map_err(failed("waiting"))?;
                }
                if !done {
                    self.raw.wait_for_fences(&[fence], true, u64::MAX).map_err(failed("waiting"))?;
                }
                self.raw.reset_fences(&[fence]).map_err(failed("waiting"))?;
            }
            fences.running.pop();
            fences.free.push(fence);
        }
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = self.wait();
        let fences = std::mem::take(&mut *self.fences());
        // SAFETY: nothing waits for them any more.
        fences.running.iter().chain(&fences.free).for_each(|fence| unsafe { self.raw.destroy_fence(*fence, None) });
    }
}

/// Memory that the host sees all the time.
pub(crate) struct Mapped {
    shared: Arc<Shared>,
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the pointer is to memory of this value alone.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Writes; nothing that reads it may run.
    pub(crate) fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        assert!(at + bytes.len() <= self.bytes, "{} bytes at {at} of {}", bytes.len(), self.bytes);
        self.shared.wait()?;
        // SAFETY: inside the mapping, which nobody else writes; the device reads it only between a submission and its fence.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) };
        Ok(())
    }

    /// How many there are.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Reads what submissions wrote, once they have run.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes, "{} bytes of {}", bytes.len(), self.bytes);
        self.shared.wait()?;
        // SAFETY: inside the mapping; the device writes it only between a submission and its fence.
        unsafe { std::ptr::copy_nonoverlapping(self.start, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = self.shared.wait();
        // SAFETY: ours, and no submission uses it any more. Freeing memory unmaps it.
        unsafe {
            self.shared.raw.destroy_buffer(self.buffer, None);
            self.shared.raw.free_memory(self.memory, None);
        }
    }
}

/// A kernel.
pub(crate) struct Pipeline {
    shared: Arc<Shared>,
    raw: vk::Pipeline,
    layout: vk::PipelineLayout,
    sets: vk::DescriptorSetLayout,
    bindings: u32,
    /// Bits of the bindings that it writes.
    writes: u32,
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        let _ = self.shared.wait();
        // SAFETY: ours, and no submission uses it any more: commands hold on to their pipelines.
        unsafe {
            self.shared.raw.destroy_pipeline(self.raw, None);
            self.shared.raw.destroy_pipeline_layout(self.layout, None);
            self.shared.raw.destroy_descriptor_set_layout(self.sets, None);
        }
    }
}

/// Commands that can be submitted any number of times.
pub(crate) struct Commands {
    shared: Arc<Shared>,
    pool: vk::CommandPool,
    descriptors: vk::DescriptorPool,
    raw: vk::CommandBuffer,
    /// What they name.
    _pipelines: Vec<Arc<Pipeline>>,
    _buffers: Vec<wgpu::Buffer>,
}

impl Drop for Commands {
    fn drop(&mut self) {
        let _ = self.shared.wait();
        // SAFETY: ours, and they do not run any more.
        unsafe {
            self.shared.raw.destroy_command_pool(self.pool, None);
            self.shared.raw.destroy_descriptor_pool(self.descriptors, None);
        }
    }
}

/// What commands do: everything in this order.
pub(crate) struct Program<'a> {
    /// Starts and ends of what is copied from mapped memory to the same place of a buffer.
    pub(crate) copy_in: Option<(&'a Mapped, &'a wgpu::Buffer, &'a [(usize, usize)])>,
    pub(crate) dispatches: &'a [Dispatch],
    /// Timestamps: one in front of the dispatches, one behind each of these.
    pub(crate) stamps: Option<(&'a Stamps, &'a [usize])>,
    /// A range that is copied to the start of mapped memory.
    pub(crate) copy_out: Option<(&'a Memory, u64, &'a Mapped, u64)>,
}

/// Timestamps of a submission.
pub(crate) struct Stamps {
    shared: Arc<Shared>,
    raw: vk::QueryPool,
}

impl Stamps {
    /// The first so many.
    pub(crate) fn read(&self, count: usize) -> Result<Vec<u64>> {
        self.shared.wait()?;
        let mut ticks = vec![0u64; count];
        let flags = vk::QueryResultFlags::TYPE_64 | vk::QueryResultFlags::WAIT;
        // SAFETY: the commands that write them have run.
        unsafe { self.shared.raw.get_query_pool_results(self.raw, 0, &mut ticks, flags) }
            .map_err(failed("the clock"))?;
        Ok(ticks)
    }
}

impl Drop for Stamps {
    fn drop(&mut self) {
        let _ = self.shared.wait();
        // SAFETY: ours, and no submission uses it any more.
        unsafe { self.shared.raw.destroy_query_pool(self.raw, None) };
    }
}

/// A device of wgpu that is one of Vulkan.
pub(crate) struct Vulkan {
    shared: Arc<Shared>,
    options: naga::back::spv::Options<'static>,
    flags: vk::PipelineShaderStageCreateFlags,
    /// What the driver compiled, or null.
    cache: vk::PipelineCache,
}

impl Drop for Vulkan {
    fn drop(&mut self) {
        // SAFETY: ours; null is nothing.
        unsafe { self.shared.raw.destroy_pipeline_cache(self.cache, None) };
    }
}

impl Vulkan {
    /// The Vulkan device below wgpu's; nothing where there is none, or it is too old for what kernels need. `is_software`: the adapter needs
    /// the host's cores.
    pub(crate) fn below(device: &wgpu::Device, is_software: bool) -> Result<Option<Vulkan>> {
        // SAFETY: nothing of it is destroyed here.
        let Some(hal) = (unsafe { device.as_hal::<wgpu::hal::api::Vulkan>() }) else { return Ok(None) };
        let instance = hal.shared_instance();
        // SAFETY: the physical device is one of the instance.
        let (properties, memory) = unsafe {
            let (raw, physical) = (instance.raw_instance(), hal.raw_physical_device());
            (raw.get_physical_device_properties(physical), raw.get_physical_device_memory_properties(physical))
        };
        if instance.instance_api_version().min(properties.api_version) < vk::API_VERSION_1_3 {
            return Ok(None);
        }
        let raw = hal.raw_device().clone();
        let has_subgroups = device.features().contains(wgpu::Features::SUBGROUP);
        let flags = match has_subgroups {
            true => vk::PipelineShaderStageCreateFlags::ALLOW_VARYING_SUBGROUP_SIZE,
            false => vk::PipelineShaderStageCreateFlags::empty(),
        };
        let shared = Shared {
            queue: hal.raw_queue(),
            family: hal.queue_family_index(),
            memory_types: memory.memory_types_as_slice().to_vec(),
            fences: Mutex::default(),
            spin: if is_software { Duration::ZERO } else { SPIN },
            raw,
            _device: device.clone(),
        };
        Ok(Some(Vulkan {
            shared: Arc::new(shared),
            options: options(device.features()),
            flags,
            cache: vk::PipelineCache::null(),
        }))
    }

    /// Keeps what is compiled from now on; `known`: what [`Vulkan::compiled`] gave an earlier run on this adapter.
    pub(crate) fn open_cache(&mut self, known: Option<&[u8]>) -> Result<()> {
        let info = vk::PipelineCacheCreateInfo::default().initial_data(known.unwrap_or_default());
        // SAFETY: the driver looks at its own header first, and what is behind it has the sum that it was kept with. The one before is unused.
        unsafe {
            let cache = self.shared.raw.create_pipeline_cache(&info, None).map_err(failed("compiled kernels"))?;
            self.shared.raw.destroy_pipeline_cache(std::mem::replace(&mut self.cache, cache), None);
        }
        Ok(())
    }

    /// What was compiled, for the next run.
    pub(crate) fn compiled(&self) -> Option<Vec<u8>> {
        let is_open = self.cache != vk::PipelineCache::null();
        // SAFETY: it is ours.
        is_open.then(|| unsafe { self.shared.raw.get_pipeline_cache_data(self.cache) })?.ok()
    }

    /// Compiles a kernel.
    pub(crate) fn compile(&self, wgsl: &str, bindings: u32) -> Result<Pipeline> {
        let (words, writes) = spirv(wgsl, &self.options).map_err(device_error)?;
        let raw = &self.shared.raw;
        let entries: Vec<_> = (0..bindings)
            .map(|binding| {
                vk::DescriptorSetLayoutBinding::default()
                    .binding(binding)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .descriptor_count(1)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
            })
            .collect();
        let range = vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(IMMEDIATES_BYTES);
        let mut pipeline = Pipeline {
            shared: Arc::clone(&self.shared),
            raw: vk::Pipeline::null(),
            layout: vk::PipelineLayout::null(),
            sets: vk::DescriptorSetLayout::null(),
            bindings,
            writes,
        };
        // SAFETY: the module is what naga made of a valid kernel, whose bindings and immediates are those of the layout; what is made
        // is destroyed by `drop`, where null is nothing.
        unsafe {
            let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&entries);
            pipeline.sets = raw.create_descriptor_set_layout(&info, None).map_err(failed("bindings"))?;
            let (sets, ranges) = ([pipeline.sets], [range]);
            let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets).push_constant_ranges(&ranges);
            pipeline.layout = raw.create_pipeline_layout(&info, None).map_err(failed("bindings"))?;
            let info = vk::ShaderModuleCreateInfo::default().code(&words);
            let module = raw.create_shader_module(&info, None).map_err(failed("a kernel"))?;
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .flags(self.flags)
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(c"main");
            let info = vk::ComputePipelineCreateInfo::default().layout(pipeline.layout).stage(stage);
            let made = raw.create_compute_pipelines(self.cache, &[info], None);
            raw.destroy_shader_module(module, None);
            pipeline.raw = made.map_err(|(_, error)| failed("a kernel")(error))?[0];
        }
        Ok(pipeline)
    }

    /// Memory that the host sees: to write it before a step, or to read it behind one.
    pub(crate) fn map(&self, bytes: usize, to_read: bool) -> Result<Mapped> {
        use vk::MemoryPropertyFlags as Flags;
        let raw = &self.shared.raw;
        let usage = vk::BufferUsageFlags::TRANSFER_SRC | vk::BufferUsageFlags::TRANSFER_DST;
        let info = vk::BufferCreateInfo::default().size(bytes.max(16) as u64).usage(usage);
        let mut mapped = Mapped {
            shared: Arc::clone(&self.shared),
            buffer: vk::Buffer::null(),
            memory: vk::DeviceMemory::null(),
            start: std::ptr::null_mut(),
            bytes,
        };
        // SAFETY: a new buffer with new memory of its own, of a type that it may have; `drop` destroys what is made, null is nothing.
        unsafe {
            mapped.buffer = raw.create_buffer(&info, None).map_err(failed("a buffer"))?;
            let needs = raw.get_buffer_memory_requirements(mapped.buffer);
            let visible = Flags::HOST_VISIBLE | Flags::HOST_COHERENT;
            let best = if to_read { visible | Flags::HOST_CACHED } else { visible };
            let types = self.shared.memory_types.iter().map(|kind| kind.property_flags).enumerate();
            let find = |flags: Flags| {
                let fits = |(i, has): &(usize, Flags)| needs.memory_type_bits >> i & 1 == 1 && has.contains(flags);
                types.clone().find(fits).map(|(i, _)| i as u32)
            };
            let kind =
                find(best).or_else(|| find(visible)).ok_or_else(|| device_error("no memory that the host sees"))?;
            let info = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(kind);
            mapped.memory = raw.allocate_memory(&info, None).map_err(failed("memory that the host sees"))?;
            raw.bind_buffer_memory(mapped.buffer, mapped.memory, 0).map_err(failed("memory that the host sees"))?;
            let start = raw.map_memory(mapped.memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty());
            mapped.start = start.map_err(failed("memory that the host sees"))?.cast();
        }
        Ok(mapped)
    }

    /// Room for so many timestamps.
    pub(crate) fn stamps(&self, count: usize) -> Result<Stamps> {
        let info = vk::QueryPoolCreateInfo::default().query_type(vk::QueryType::TIMESTAMP).query_count(count as u32);
        // SAFETY: destroyed by `drop`.
        let raw = unsafe { self.shared.raw.create_query_pool(&info, None) }.map_err(failed("the clock"))?;
        Ok(Stamps { shared: Arc::clone(&self.shared), raw })
    }

    /// Records commands.
    pub(crate) fn record(&self, program: &Program<'_>) -> Result<Commands> {
        let raw = &self.shared.raw;
        let mut commands = Commands {
            shared: Arc::clone(&self.shared),
            pool: vk::CommandPool::null(),
            descriptors: vk::DescriptorPool::null(),
            raw: vk::CommandBuffer::null(),
            _pipelines: program.dispatches.iter().filter_map(|d| d.kernel.vulkan().cloned()).collect(),
            _buffers: Vec::new(),
        };
        let mut seen = HashSet::new();
        let memories = program.dispatches.iter().flat_map(|d| d.bound.memories.iter());
        let memories = memories.chain(program.copy_out.map(|(memory, ..)| memory));
        commands._buffers = memories.filter(|m| seen.insert(m.id)).map(|m| m.buffer.clone()).collect();
        commands._buffers.extend(program.copy_in.map(|(_, buffer, _)| buffer.clone()));
        let info = vk::CommandPoolCreateInfo::default().queue_family_index(self.shared.family);
        let begin = vk::CommandBufferBeginInfo::default();
        // SAFETY: see the top of this file.
        unsafe {
            commands.pool = raw.create_command_pool(&info, None).map_err(failed("commands"))?;
            let info = vk::CommandBufferAllocateInfo::default().command_pool(commands.pool).command_buffer_count(1);
            commands.raw = raw.allocate_command_buffers(&info).map_err(failed("commands"))?[0];
            raw.begin_command_buffer(commands.raw, &begin).map_err(failed("commands"))?;
        }
        self.encode(program, &mut commands)?;
        // SAFETY: it was begun above.
        unsafe { raw.end_command_buffer(commands.raw) }.map_err(failed("commands"))?;
        Ok(commands)
    }

    fn encode(&self, program: &Program<'_>, commands: &mut Commands) -> Result<()> {
        let (raw, to) = (&self.shared.raw, commands.raw);
        let everything = |stages: vk::PipelineStageFlags| {
            let access = vk::AccessFlags::MEMORY_READ | vk::AccessFlags::MEMORY_WRITE;
            let barrier = vk::MemoryBarrier::default().src_access_mask(access).dst_access_mask(access);
            let all = vk::PipelineStageFlags::ALL_COMMANDS;
            // SAFETY: see the top of this file.
            unsafe { raw.cmd_pipeline_barrier(to, all, all | stages, Default::default(), &[barrier], &[], &[]) };
        };
        everything(vk::PipelineStageFlags::empty());
        if let Some((from, buffer, ranges)) = program.copy_in.filter(|(_, _, ranges)| !ranges.is_empty()) {
            let regions: Vec<_> = ranges
                .iter()
                .map(|(start, end)| vk::BufferCopy {
                    src_offset: *start as u64,
                    dst_offset: *start as u64,
                    size: (end - start) as u64,
                })
                .collect();
            // SAFETY: ranges of both, which `Inputs` has.
            unsafe { raw.cmd_copy_buffer(to, from.buffer, handle(buffer)?, &regions) };
            everything(vk::PipelineStageFlags::empty());
        }
        self.encode_dispatches(program, commands)?;
        if let Some((memory, at, staging, bytes)) = program.copy_out {
            everything(vk::PipelineStageFlags::empty());
            let region = vk::BufferCopy { src_offset: memory.offset + at, dst_offset: 0, size: bytes };
            // SAFETY: a range of the memory, and of what the host sees.
            unsafe { raw.cmd_copy_buffer(to, handle(&memory.buffer)?, staging.buffer, &[region]) };
        }
        everything(vk::PipelineStageFlags::HOST);
        Ok(())
    }

    fn encode_dispatches(&self, program: &Program<'_>, commands: &mut Commands) -> Result<()> {
        let (raw, to) = (&self.shared.raw, commands.raw);
        let compute = vk::PipelineBindPoint::COMPUTE;
        let stamp = |i: usize| {
            if let Some((stamps, _)) = program.stamps {
                // SAFETY: there is room for one more than there are marks.
                unsafe { raw.cmd_write_timestamp(to, vk::PipelineStageFlags::ALL_COMMANDS, stamps.raw, i as u32) };
            }
        };
        if let Some((stamps, marks)) = program.stamps {
            // SAFETY: as above.
            unsafe { raw.cmd_reset_query_pool(to, stamps.raw, 0, marks.len() as u32 + 1) };
        }
        stamp(0);
        let sets = self.descriptor_sets(program.dispatches, commands)?;
        let mut hazards = Hazards::default();
        let mut next_mark = 0;
        let mut bound = vk::Pipeline::null();
        for (i, (dispatch, set)) in program.dispatches.iter().zip(sets).enumerate() {
            let pipeline = own(dispatch)?;
            if hazards.needs_barrier(dispatch, pipeline) {
                let barrier = vk::MemoryBarrier::default()
                    .src_access_mask(vk::AccessFlags::SHADER_WRITE)
                    .dst_access_mask(vk::AccessFlags::SHADER_READ | vk::AccessFlags::SHADER_WRITE);
                let stage = vk::PipelineStageFlags::COMPUTE_SHADER;
                // SAFETY: see the top of this file.
                unsafe { raw.cmd_pipeline_barrier(to, stage, stage, Default::default(), &[barrier], &[], &[]) };
            }
            let [x, y, z] = dispatch.grid;
            // SAFETY: the set has the pipeline's layout; wgpu ran the same kernel on the same memory with the same arguments and grid.
            unsafe {
                if bound != pipeline.raw {
                    raw.cmd_bind_pipeline(to, compute, pipeline.raw);
                    bound = pipeline.raw;
                }
                raw.cmd_bind_descriptor_sets(to, compute, pipeline.layout, 0, &[set], &[]);
                let arguments = bytemuck::cast_slice(&dispatch.arguments);
                if !dispatch.arguments.is_empty() {
                    raw.cmd_push_constants(to, pipeline.layout, vk::ShaderStageFlags::COMPUTE, 0, arguments);
                }
                raw.cmd_dispatch(to, x, y, z);
            }
            if let Some((_, marks)) = program.stamps.filter(|(_, marks)| marks.get(next_mark) == Some(&i)) {
                next_mark += 1;
                debug_assert!(next_mark <= marks.len());
                stamp(next_mark);
            }
        }
        Ok(())
    }

    /// What each dispatch binds.
    fn descriptor_sets(&self, dispatches: &[Dispatch], commands: &mut Commands) -> Result<Vec<vk::DescriptorSet>> {
        let raw = &self.shared.raw;
        let bindings: usize = dispatches.iter().map(|d| d.bound.memories.len()).sum();
        if bindings == 0 {
            return Ok(Vec::new());
        }
        let size =
            vk::DescriptorPoolSize::default().ty(vk::DescriptorType::STORAGE_BUFFER).descriptor_count(bindings as u32);
        let sizes = [size];
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(dispatches.len() as u32).pool_sizes(&sizes);
        // SAFETY: the pool has room for what is allocated, and lives as long as the commands.
        unsafe {
            commands.descriptors = raw.create_descriptor_pool(&info, None).map_err(failed("bindings"))?;
            let layouts =
                dispatches.iter().map(|d| own(d).map(|pipeline| pipeline.sets)).collect::<Result<Vec<_>>>()?;
            let info =
                vk::DescriptorSetAllocateInfo::default().descriptor_pool(commands.descriptors).set_layouts(&layouts);
            let sets = raw.allocate_descriptor_sets(&info).map_err(failed("bindings"))?;
            for (dispatch, set) in dispatches.iter().zip(&sets) {
                assert_eq!(
                    own(dispatch)?.bindings as usize,
                    dispatch.bound.memories.len(),
                    "bindings of {}",
                    dispatch.name
                );
                let info = |m: &Memory| {
                    let info = vk::DescriptorBufferInfo::default().buffer(handle(&m.buffer)?);
                    Ok(info.offset(m.offset).range(m.bytes))
                };
                let infos = dispatch.bound.memories.iter().map(info).collect::<Result<Vec<_>>>()?;
                let write = vk::WriteDescriptorSet::default()
                    .dst_set(*set)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .buffer_info(&infos);
                raw.update_descriptor_sets(&[write], &[]);
            }
            Ok(sets)
        }
    }

    /// Submits commands, one after the other, none of which may run.
    pub(crate) fn submit(&self, commands: &[&Commands]) -> Result<()> {
        let (raw, mut fences) = (&self.shared.raw, self.shared.fences());
        let buffers: Vec<_> = commands.iter().map(|commands| commands.raw).collect();
        let info = vk::SubmitInfo::default().command_buffers(&buffers);
        let fence = match fences.free.pop() {
            Some(fence) => fence,
            // SAFETY: destroyed with the rest of `shared`.
            None => unsafe { raw.create_fence(&vk::FenceCreateInfo::default(), None) }.map_err(failed("a fence"))?,
        };
        // SAFETY: the queue is used by one thread at a time, the one that has this back end; the fence is not in use.
        let submitted = unsafe { raw.queue_submit(self.shared.queue, &[info], fence) };
        if submitted.is_ok() { &mut fences.running } else { &mut fences.free }.push(fence);
        submitted.map_err(failed("submitting"))
    }

    /// Waits until what was submitted has run.
    pub(crate) fn wait(&self) -> Result<()> {
        self.shared.wait()
    }
}

fn own(dispatch: &Dispatch) -> Result<&Arc<Pipeline>> {
    dispatch.kernel.vulkan().ok_or_else(|| device_error(format!("kernel {} is not Vulkan's", dispatch.name)))
}

/// A buffer of wgpu's, as Vulkan knows it.
fn handle(buffer: &wgpu::Buffer) -> Result<vk::Buffer> {
    // SAFETY: it is not destroyed here.
    let hal = unsafe { buffer.as_hal::<wgpu::hal::api::Vulkan>() };
    // SAFETY: as above.
    hal.map(|hal| unsafe { hal.raw_handle() }).ok_or_else(|| device_error("a buffer that is not Vulkan's"))
}

/// What dispatches read and wrote since the last barrier.
#[derive(Default)]
struct Hazards {
    read: HashSet<u64>,
    written: HashSet<u64>,
}

impl Hazards {
    /// Whether a dispatch has to wait for those before; it is one of them from now on.
    fn needs_barrier(&mut self, dispatch: &Dispatch, pipeline: &Pipeline) -> bool {
        let writes = |i: usize| pipeline.writes >> i & 1 == 1;
        let meets = dispatch
            .bound
            .memories
            .iter()
            .enumerate()
            .any(|(i, memory)| self.written.contains(&memory.id) || writes(i) && self.read.contains(&memory.id));
        if meets {
            self.read.clear();
            self.written.clear();
        }
        for (i, memory) in dispatch.bound.memories.iter().enumerate() {
            if writes(i) { &mut self.written } else { &mut self.read }.insert(memory.id);
        }
        meets
    }
}

/// What wgpu gives its own compiler, without checks.
fn options(features: wgpu::Features) -> naga::back::spv::Options<'static> {
    use naga::back::spv::{Capability as Has, Options, WriterFlags, ZeroInitializeWorkgroupMemoryMode};
    let mut capabilities = vec![
        Has::Shader,
        Has::Matrix,
        Has::DotProductInputAllKHR,
        Has::DotProductInput4x8BitKHR,
        Has::DotProductInput4x8BitPackedKHR,
        Has::DotProductKHR,
    ];
    if features.contains(wgpu::Features::SUBGROUP) {
        capabilities.extend([
            Has::GroupNonUniform,
            Has::GroupNonUniformVote,
            Has::GroupNonUniformArithmetic,
            Has::GroupNonUniformBallot,
            Has::GroupNonUniformShuffle,
            Has::GroupNonUniformShuffleRelative,
            Has::GroupNonUniformQuad,
        ]);
    }
    if features.contains(wgpu::Features::SHADER_F16) {
        capabilities.push(Has::Float16);
    }
    if features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        capabilities.extend([Has::CooperativeMatrixKHR, Has::VulkanMemoryModel]);
    }
    Options {
        lang_version: (1, 6),
        flags: WriterFlags::LABEL_VARYINGS,
        capabilities: Some(capabilities.into_iter().collect()),
        bounds_check_policies: naga::proc::BoundsCheckPolicies {
            index: naga::proc::BoundsCheckPolicy::Unchecked,
            buffer: naga::proc::BoundsCheckPolicy::Unchecked,
            image_load: naga::proc::BoundsCheckPolicy::Unchecked,
            binding_array: naga::proc::BoundsCheckPolicy::Unchecked,
        },
        zero_initialize_workgroup_memory: ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        // Of stages of drawing.
        use_storage_input_output_16: false,
        emit_int_div_checks: false,
        ..Options::default()
    }
}

/// SPIR-V of a kernel, and bits of the bindings that it writes.
fn spirv(wgsl: &str, options: &naga::back::spv::Options<'_>) -> std::result::Result<(Vec<u32>, u32), String> {
    use naga::valid::{Capabilities, GlobalUse, ValidationFlags, Validator};
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|e| e.emit_to_string(wgsl))?;
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    let info = validator.validate(&module).map_err(|e| e.emit_to_string(wgsl))?;
    let entry = info.get_entry_point(0);
    let writes = module
        .global_variables
        .iter()
        .filter(|(handle, _)| entry[*handle].intersects(GlobalUse::WRITE | GlobalUse::ATOMIC));
    let writes = writes.filter_map(|(_, variable)| variable.binding).fold(0, |bits, at| bits | 1 << at.binding);
    let words = naga::back::spv::write_vec(&module, &info, options, None).map_err(|e| e.to_string())?;
    Ok((words, writes))
}
