//! The CUDA driver behind a safe surface: one context, one stream, memory, kernels and graphs. The library is loaded at
//! run time, so the same binary runs where there is no driver, and says so.
//!
//! `unsafe` is calls into the driver. Each wrapper owns what it made, or checks what it was given; kernels themselves are trusted
//! with the device pointers in their arguments, which come from buffers and weights that the back end owns.
#![allow(unsafe_code)]

use cudarc::driver::sys;
use moellon_ops::{Error, Result};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr;

/// An address in device memory; 0 is null.
pub(crate) type DevicePtr = u64;

/// Name of the back end in errors.
pub(crate) const NAME: &str = "cuda";

/// An error of the device or its driver.
pub(crate) fn device_error(message: impl Into<String>) -> Error {
    Error::Device { backend: NAME, message: message.into() }
}

fn check(result: sys::CUresult, what: &str) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const std::ffi::c_char = ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or leaves null.
    let text = unsafe {
        let _ = sys::cuGetErrorString(result, &raw mut text);
        if text.is_null() { "no description".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    let advice = if is_lost(result) { "; this program has lost the GPU and must be started again" } else { "" };
    Err(device_error(format!("{what}: {text} ({result:?}){advice}")))
}

/// Whether nothing works any more in this process, a new context neither, as the driver's documentation says of these.
fn is_lost(result: sys::CUresult) -> bool {
    use sys::CUresult as R;
    matches!(
        result,
        R::CUDA_ERROR_ILLEGAL_ADDRESS
            | R::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | R::CUDA_ERROR_MISALIGNED_ADDRESS
            | R::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | R::CUDA_ERROR_INVALID_PC
            | R::CUDA_ERROR_HARDWARE_STACK_ERROR
            | R::CUDA_ERROR_LAUNCH_FAILED
            | R::CUDA_ERROR_LAUNCH_TIMEOUT
            | R::CUDA_ERROR_ASSERT
            | R::CUDA_ERROR_ECC_UNCORRECTABLE
    )
}

/// One GPU: its primary context and one stream.
pub(crate) struct Device {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    thread: Option<std::thread::ThreadId>,
    /// `NVIDIA H200`.
    pub(crate) name: String,
    /// Major and minor compute capability.
    pub(crate) capability: (i32, i32),
    /// Streaming multiprocessors.
    pub(crate) multiprocessors: u32,
    /// Most shared memory of a block, in bytes.
    pub(crate) shared_bytes: u32,
    /// Driver's CUDA version, e.g. 13000.
    pub(crate) driver_version: i32,
    /// Events around kernels while they are timed.
    clock: Option<KernelClock>,
    /// The next kernel waits for everything before it.
    separate: bool,
}

// SAFETY: the driver's handles may be used from any thread; `Device::enter` makes the context current on the one that calls.
unsafe impl Send for Device {}

impl Device {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// In one line: no driver, no such GPU, or what the driver says.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        // SAFETY: asking whether the library can be loaded.
        if !unsafe { sys::is_culib_present() } {
            return Err(device_error("no NVIDIA driver on this machine (libcuda is not found)"));
        }
        let (mut device, mut count, mut driver_version) = (0, 0, 0);
        let mut context = ptr::null_mut();
        let mut stream = ptr::null_mut();
        let mut name = [0 as std::ffi::c_char; 256];
        // SAFETY: out pointers are valid for the types that the driver writes.
        unsafe {
            check(sys::cuInit(0), "starting the CUDA driver")?;
            check(sys::cuDriverGetVersion(&raw mut driver_version), "asking for the driver's version")?;
            check(sys::cuDeviceGetCount(&raw mut count), "counting GPUs")?;
            if ordinal as i64 >= i64::from(count) {
                return Err(device_error(format!("GPU {ordinal} does not exist, this machine has {count}")));
            }
            check(sys::cuDeviceGet(&raw mut device, ordinal as i32), "opening the GPU")?;
            check(sys::cuDeviceGetName(name.as_mut_ptr(), 256, device), "asking for the GPU's name")?;
            check(sys::cuDevicePrimaryCtxRetain(&raw mut context, device), "making a context on the GPU")?;
            check(sys::cuCtxSetCurrent(context), "entering the GPU's context")?;
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check(sys::cuStreamCreate(&raw mut stream, flags), "making a stream")?;
        }
        // SAFETY: the driver wrote a string with a final zero into the 256 bytes.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: as above.
            check(unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) }, "asking for an attribute")?;
            Ok::<i32, Error>(value)
        };
        use sys::CUdevice_attribute as A;
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let shared_bytes = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        let thread = Some(std::thread::current().id());
        Ok(Device {
            device,
            context,
            stream,
            thread,
            name,
            capability,
            multiprocessors,
            shared_bytes,
            driver_version,
            clock: None,
            separate: false,
        })
    }

    /// Makes the context current on the calling thread.
    fn enter(&mut self) -> Result<()> {
        let thread = Some(std::thread::current().id());
        if self.thread != thread {
            // SAFETY: the context lives as long as `self`.
            check(unsafe { sys::cuCtxSetCurrent(self.context) }, "entering the GPU's context")?;
            self.thread = thread;
        }
        Ok(())
    }

    /// Free and total bytes of device memory.
    pub(crate) fn memory(&mut self) -> Result<(u64, u64)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: out pointers.
        check(unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }, "asking for free memory")?;
        Ok((free as u64, total as u64))
    }

    /// Allocates `bytes` of device memory, not initialised.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the numbers.
    pub(crate) fn alloc(&mut self, what: &str, bytes: u64) -> Result<Memory> {
        self.enter()?;
        let mut pointer = 0;
        // SAFETY: out pointer; the memory is owned by the returned value.
        let result = unsafe { sys::cuMemAlloc_v2(&raw mut pointer, bytes.max(16) as usize) };
        if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let free_bytes = self.memory().map_or(0, |m| m.0);
            return Err(Error::OutOfMemory { backend: NAME, what: what.to_owned(), needed_bytes: bytes, free_bytes });
        }
        check(result, &format!("allocating {bytes} bytes for {what}"))?;
        Ok(Memory { pointer, bytes })
    }

    /// Allocates zeroed memory.
    pub(crate) fn alloc_zeroed(&mut self, what: &str, bytes: u64) -> Result<Memory> {
        let memory = self.alloc(what, bytes)?;
        // SAFETY: the range was just allocated.
        let result = unsafe { sys::cuMemsetD8Async(memory.pointer, 0, bytes as usize, self.stream) };
        check(result, &format!("zeroing {what}"))?;
        Ok(memory)
    }

    /// Page-locked host memory.
    pub(crate) fn alloc_pinned(&mut self, bytes: usize) -> Result<Pinned> {
        self.enter()?;
        let mut pointer: *mut c_void = ptr::null_mut();
        // SAFETY: out pointer; the memory is owned by the returned value.
        check(unsafe { sys::cuMemHostAlloc(&raw mut pointer, bytes, 0) }, "allocating page-locked memory")?;
        Ok(Pinned { pointer: pointer.cast(), bytes })
    }

    /// Copies `source` to the device; returns when `source` may be reused.
    pub(crate) fn upload(&mut self, to: DevicePtr, source: &[u8]) -> Result<()> {
        self.upload_async(to, source)?;
        self.synchronize()
    }

    /// Appends a copy of `source` to the stream. Page-locked sources must stay as they are until the stream has passed.
    pub(crate) fn upload_async(&mut self, to: DevicePtr, source: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: `to` points at memory of the back end with at least that many bytes (its callers check their views).
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(to, source.as_ptr().cast(), source.len(), self.stream) };
        check(result, "copying to the GPU")
    }

    /// Waits for the stream and copies from the device.
    pub(crate) fn download(&mut self, from: DevicePtr, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: as for `upload_async`; the copy has ended when `synchronize` returns.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.stream) };
        check(result, "copying from the GPU")?;
        self.synchronize()
    }

    /// Waits for the stream.
    pub(crate) fn synchronize(&mut self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        check(unsafe { sys::cuStreamSynchronize(self.stream) }, "waiting for the GPU")
    }

    /// Loads a CUBIN.
    pub(crate) fn load_module(&mut self, what: &str, image: &[u8]) -> Result<Module> {
        self.enter()?;
        let mut module = ptr::null_mut();
        // SAFETY: `image` is a whole CUBIN made by NVRTC; the driver checks its header.
        let result = unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) };
        check(result, &format!("loading kernels {what}"))?;
        Ok(Module { module, functions: HashMap::new() })
    }

    /// Blocks of a kernel that the GPU holds at a time, with `block` threads and `shared` bytes of dynamic shared memory each.
    pub(crate) fn resident_blocks(&mut self, kernel: &Kernel, block: u32, shared: u32) -> Result<usize> {
        self.enter()?;
        let mut blocks = 0;
        // SAFETY: out pointer; the function is loaded.
        let result = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &raw mut blocks,
                kernel.function,
                block as i32,
                shared as usize,
            )
        };
        check(result, &format!("asking how many blocks of {} fit", kernel.name))?;
        Ok(self.multiprocessors as usize * blocks.max(1) as usize)
    }

    /// Clusters of `size` blocks that the GPU holds at a time, with `block` threads and `shared` bytes of dynamic shared memory a block.
    pub(crate) fn resident_clusters(&mut self, kernel: &Kernel, size: u32, block: u32, shared: u32) -> Result<usize> {
        self.enter()?;
        let mut attributes = [Clusters { count: 1, blocks: size }.attribute()];
        let config = launch_config([size, 1, 1], block, shared, self.stream, &mut attributes);
        let mut clusters = 0;
        // SAFETY: out pointer; the function is loaded, and the configuration lives until the call returns.
        let result =
            unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut clusters, kernel.function, &raw const config) };
        check(result, &format!("asking how many clusters of {} fit", kernel.name))?;
        Ok(clusters.max(0) as usize)
    }

    /// Appends a kernel to the stream. `args` is the kernel's one argument.
    pub(crate) fn launch<A: Copy>(
        &mut self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        args: &A,
    ) -> Result<()> {
        self.launch_attributed(kernel, grid, block, shared, args, None)
    }

    /// The same for a kernel whose blocks work together in clusters.
    pub(crate) fn launch_clusters<A: Copy>(
        &mut self,
        kernel: &Kernel,
        clusters: Clusters,
        block: u32,
        shared: u32,
        args: &A,
    ) -> Result<()> {
        self.launch_attributed(kernel, [clusters.count * clusters.blocks, 1, 1], block, shared, args, Some(clusters))
    }

    fn launch_attributed<A: Copy>(
        &mut self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        args: &A,
        clusters: Option<Clusters>,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.enter()?;
        let mut attributes = Vec::new();
        // A kernel may start while the one before it works (programmatic dependent launch).
        if self.capability.0 >= 9 && !std::mem::take(&mut self.separate) {
            attributes.push(sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: Default::default(),
                value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            });
        }
        attributes.extend(clusters.map(Clusters::attribute));
        let config = launch_config(grid, block, shared, self.stream, &mut attributes);
        let mut parameters = [ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the argument struct is the kernel's own (args.rs); the driver copies it and the attributes before it returns.
        let result = unsafe {
            sys::cuLaunchKernelEx(&raw const config, kernel.function, parameters.as_mut_ptr(), ptr::null_mut())
        };
        if result == sys::CUresult::CUDA_SUCCESS {
            return self.mark(kernel.name);
        }
        check(result, &format!("launching {} with grid {grid:?}, {block} threads, {shared} bytes", kernel.name))
    }

    /// The next kernel starts when everything before it has ended: for weights, which kernels ask for before they wait for the kernel before.
    pub(crate) fn separate(&mut self) {
        self.separate = true;
    }

    /// Times every kernel from now on, until [`Device::stop_clock`].
    pub(crate) fn start_clock(&mut self) -> Result<()> {
        self.enter()?;
        self.clock = Some(KernelClock::default());
        self.mark("")
    }

    /// Names of the kernels since [`Device::start_clock`] and the seconds from one's end to the next one's.
    pub(crate) fn stop_clock(&mut self) -> Result<Vec<(&'static str, f64)>> {
        self.synchronize()?;
        let Some(clock) = self.clock.take() else { return Ok(Vec::new()) };
        clock.marks.windows(2).map(|pair| Ok((pair[1].0, pair[0].1.seconds_to(&pair[1].1)?))).collect()
    }

    /// Remembers that a kernel ends here, if kernels are timed.
    fn mark(&mut self, name: &'static str) -> Result<()> {
        if self.clock.is_some() {
            let event = Event::new()?;
            self.record(&event)?;
            self.clock.as_mut().expect("it was there").marks.push((name, event));
        }
        Ok(())
    }

    /// An event that nobody has to wait for yet.
    pub(crate) fn event(&mut self) -> Result<Event> {
        self.enter()?;
        Event::new()
    }

    /// Puts the event behind all that was appended to the stream so far.
    pub(crate) fn record(&mut self, event: &Event) -> Result<()> {
        self.enter()?;
        // SAFETY: the event and the stream are alive.
        check(unsafe { sys::cuEventRecord(event.0, self.stream) }, "recording an event")
    }

    /// Waits until the stream has passed the event; at once if it was never recorded.
    pub(crate) fn wait_for(&mut self, event: &Event) -> Result<()> {
        self.enter()?;
        // SAFETY: the event is alive.
        check(unsafe { sys::cuEventSynchronize(event.0) }, "waiting for the GPU")
    }

    /// Starts recording what is appended to the stream.
    pub(crate) fn begin_capture(&mut self) -> Result<()> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`.
        check(unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) }, "recording a step")
    }

    /// Ends recording; the graph can be launched again and again.
    pub(crate) fn end_capture(&mut self) -> Result<Graph> {
        self.enter()?;
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: out pointers; the graph is destroyed once the executable one is made.
        unsafe {
            check(sys::cuStreamEndCapture(self.stream, &raw mut graph), "recording a step")?;
            let result = sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0);
            let _ = sys::cuGraphDestroy(graph);
            check(result, "making a graph of a step")?;
        }
        Ok(Graph { exec })
    }

    /// Appends a recorded graph to the stream.
    pub(crate) fn launch_graph(&mut self, graph: &Graph) -> Result<()> {
        self.enter()?;
        // SAFETY: the graph is alive, and so is everything that its kernels point at.
        check(unsafe { sys::cuGraphLaunch(graph.exec, self.stream) }, "running a recorded step")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: nothing else uses the stream; the context is given back once.
        unsafe {
            let _ = sys::cuStreamSynchronize(self.stream);
            let _ = sys::cuStreamDestroy_v2(self.stream);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// Events behind kernels.
#[derive(Default)]
struct KernelClock {
    marks: Vec<(&'static str, Event)>,
}

/// Blocks that run at the same time and read each other's shared memory: `count` clusters of so many.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clusters {
    pub(crate) count: u32,
    pub(crate) blocks: u32,
}

impl Clusters {
    fn attribute(self) -> sys::CUlaunchAttribute {
        let dimensions = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: self.blocks, y: 1, z: 1 };
        sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: Default::default(),
            value: sys::CUlaunchAttributeValue { clusterDim: dimensions },
        }
    }
}

fn launch_config(
    grid: [u32; 3],
    block: u32,
    shared: u32,
    stream: sys::CUstream,
    attributes: &mut [sys::CUlaunchAttribute],
) -> sys::CUlaunchConfig {
    sys::CUlaunchConfig {
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}

/// A point in the stream that can be waited for, and whose time is taken.
pub(crate) struct Event(sys::CUevent);

// SAFETY: a handle that any thread may use.
unsafe impl Send for Event {}

impl Event {
    fn new() -> Result<Self> {
        let mut event = ptr::null_mut();
        // SAFETY: out pointer; the context is current (its callers entered it).
        check(unsafe { sys::cuEventCreate(&raw mut event, 0) }, "making an event")?;
        Ok(Event(event))
    }

    /// Both have passed.
    fn seconds_to(&self, later: &Event) -> Result<f64> {
        let mut milliseconds = 0.0f32;
        // SAFETY: out pointer; both events were recorded and the stream has passed them.
        let result = unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, self.0, later.0) };
        check(result, "asking for the time between events")?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        unsafe {
            let _ = sys::cuEventDestroy_v2(self.0);
        }
    }
}

/// Device memory, freed when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    pointer: DevicePtr,
    bytes: u64,
}

impl Memory {
    /// Its address.
    pub(crate) fn pointer(&self) -> DevicePtr {
        self.pointer
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `Device::alloc`, freed once. cuMemFree waits for work that uses it.
        unsafe {
            let _ = sys::cuMemFree_v2(self.pointer);
        }
    }
}

/// Page-locked host memory, freed when dropped.
pub(crate) struct Pinned {
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory that one owner reads and writes.
unsafe impl Send for Pinned {}

impl Pinned {
    /// The bytes.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated with that size, borrowed from `self` alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `Device::alloc_pinned`, freed once.
        unsafe {
            let _ = sys::cuMemFreeHost(self.pointer.cast());
        }
    }
}

/// Loaded kernels.
pub(crate) struct Module {
    module: sys::CUmodule,
    functions: HashMap<String, Kernel>,
}

// SAFETY: a handle that any thread may use.
unsafe impl Send for Module {}

/// One kernel.
#[derive(Clone)]
pub(crate) struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
}

// SAFETY: a handle that any thread may use.
unsafe impl Send for Kernel {}

impl Module {
    /// The kernel `name`; `dynamic` allows it that many bytes of dynamic shared memory.
    pub(crate) fn kernel(&mut self, name: &str, dynamic: u32) -> Result<Kernel> {
        let found = self.find(name, dynamic)?;
        found.ok_or_else(|| device_error(format!("kernel {name} is not among those that this build has")))
    }

    /// The same where the module may have no such kernel.
    pub(crate) fn find(&mut self, name: &str, dynamic: u32) -> Result<Option<Kernel>> {
        if let Some(kernel) = self.functions.get(name) {
            return Ok(Some(kernel.clone()));
        }
        let text = CString::new(name).expect("kernel names have no zero byte");
        let mut function = ptr::null_mut();
        // SAFETY: out pointer; the module is loaded.
        unsafe {
            let result = sys::cuModuleGetFunction(&raw mut function, self.module, text.as_ptr());
            if result == sys::CUresult::CUDA_ERROR_NOT_FOUND {
                return Ok(None);
            }
            check(result, &format!("finding kernel {name}"))?;
            if dynamic > 48 * 1024 {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                check(
                    sys::cuFuncSetAttribute(function, attribute, dynamic as i32),
                    &format!("shared memory of {name}"),
                )?;
            }
        }
        // A kernel's name lives as long as the process: there are a hundred of them.
        let kernel = Kernel { function, name: String::leak(name.to_owned()) };
        self.functions.insert(name.to_owned(), kernel.clone());
        Ok(Some(kernel))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once, unloaded once.
        unsafe {
            let _ = sys::cuModuleUnload(self.module);
        }
    }
}

/// A recorded step.
pub(crate) struct Graph {
    exec: sys::CUgraphExec,
}

// SAFETY: a handle that any thread may use.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        unsafe {
            let _ = sys::cuGraphExecDestroy(self.exec);
        }
    }
}
