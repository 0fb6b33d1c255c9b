//! Records the operations on the compute stream as a graph, which one call launches again.

use super::context::Context;
use super::error;
use super::handle::Handle;
use crate::device::DeviceError;
use cudarc::driver::result;
use cudarc::driver::sys;
use std::rc::Rc;

const OPERATION: &str = "recording operations";

/// Starts recording: until [`end`], operations enqueued on the compute stream are not executed.
pub(super) fn begin(context: &Context) -> Result<(), DeviceError> {
    let stream = context.compute.raw();
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: the stream is alive.
    let begin = || unsafe { result::stream::begin_capture(stream, mode) };
    context.call(OPERATION, begin)?;
    context.handle.capturing.set(true);
    Ok(())
}

/// Ends the recording, so that work enqueued on the stream from now on is executed again.
pub(super) fn end(context: &Context) -> Result<Captured, DeviceError> {
    let stream = context.compute.raw();
    let end = || -> Result<sys::CUgraph, DeviceError> {
        // SAFETY: the stream is alive and is being recorded.
        context.call(OPERATION, || unsafe { result::stream::end_capture(stream) })
    };
    let ended = end();
    if ended.is_err() && is_capturing(context) {
        // Try once more: while the stream is being recorded, no work on it is executed.
        drop(end().map(|graph| captured(context, graph)));
    }
    context.handle.capturing.set(false);
    // If the device is lost, the driver has ended the recording itself.
    let graph = ended?;
    error::require(!graph.is_null(), OPERATION, || {
        "the driver returned no graph".to_owned()
    })?;
    Ok(captured(context, graph))
}

fn captured(context: &Context, graph: sys::CUgraph) -> Captured {
    let handle = Rc::clone(&context.handle);
    Captured { graph, handle }
}

fn is_capturing(context: &Context) -> bool {
    let stream = context.compute.raw();
    // SAFETY: the stream is alive.
    let ask = || unsafe { result::stream::is_capturing(stream) };
    let none = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    context
        .call(OPERATION, ask)
        .is_ok_and(|status| status != none)
}

/// A recorded graph, not yet executable.
pub(super) struct Captured {
    graph: sys::CUgraph,
    handle: Rc<Handle>,
}

impl Captured {
    /// Makes the graph executable.
    pub(super) fn instantiate(self) -> Result<Executable, DeviceError> {
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph is alive until `self` is dropped, and instantiation copies it.
        let instantiate = || unsafe { result::graph::instantiate(self.graph, flags) };
        Ok(Executable {
            exec: self.handle.call("making a graph", instantiate)?,
            handle: Rc::clone(&self.handle),
        })
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        if self.graph.is_null() {
            return;
        }
        // SAFETY: the graph was returned by the end of a capture, and is destroyed once.
        let destroy = || unsafe { result::graph::destroy(self.graph) };
        self.handle.cleanup("destroying a recording", destroy);
    }
}

/// An executable graph.
pub(super) struct Executable {
    exec: sys::CUgraphExec,
    handle: Rc<Handle>,
}

impl Executable {
    /// Enqueues the recorded operations on the compute stream. The caller ensures that the
    /// memory that they use has not been freed.
    pub(super) fn launch(&self, context: &Context) -> Result<(), DeviceError> {
        let stream = context.compute.raw();
        // SAFETY: the graph is executable, and the caller ensures that the memory that it
        // refers to is still allocated.
        let launch = || unsafe { result::graph::launch(self.exec, stream) };
        context.call("launching a graph", launch)
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        // SAFETY: the graph was instantiated once and is destroyed once; if it still runs, the
        // driver destroys it on completion.
        let destroy = || unsafe { result::graph::exec_destroy(self.exec) };
        self.handle.cleanup("destroying a graph", destroy);
    }
}
