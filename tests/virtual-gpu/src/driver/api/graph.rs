//! Graphs. They are created by stream capture only; nodes cannot be added or changed.

use crate::driver::codes::{self, Code};
use crate::driver::objects::Graph;
use crate::driver::{Driver, Failure, Need, call};
use std::ffi::c_void;

const AUTO_FREE_ON_LAUNCH: u64 = 1;
const UPLOAD: u64 = 2;
const DEVICE_LAUNCH: u64 = 4;
const USE_NODE_PRIORITY: u64 = 8;

fn check_flags(driver: &mut Driver, flags: u64) -> Result<(), Failure> {
    let known = AUTO_FREE_ON_LAUNCH | UPLOAD | DEVICE_LAUNCH | USE_NODE_PRIORITY;
    if flags & !known != 0 || flags & UPLOAD != 0 {
        return driver.refuse(
            codes::INVALID_VALUE,
            &format!("instantiation flags {flags:#x}"),
        );
    }
    match flags & (AUTO_FREE_ON_LAUNCH | DEVICE_LAUNCH) {
        DEVICE_LAUNCH => Err(Failure(codes::NOT_SUPPORTED)),
        both if both == AUTO_FREE_ON_LAUNCH | DEVICE_LAUNCH => Err(Failure(codes::INVALID_VALUE)),
        _ => Ok(()),
    }
}

/// # Safety
/// The pointers must be valid; see the [parent module](super).
unsafe fn instantiate(
    driver: &mut Driver,
    exec: *mut u64,
    graph: u64,
    flags: u64,
) -> Result<(), Failure> {
    check_flags(driver, flags)?;
    let made = driver.instantiate(graph)?;
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    unsafe { super::put(driver, exec, made) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    exec: *mut u64,
    graph: u64,
    flags: u64,
) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call(
        "cuGraphInstantiateWithFlags",
        Need::CONTEXT,
        |driver| unsafe { instantiate(driver, exec, graph, flags) },
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithParams(
    _exec: *mut u64,
    _graph: u64,
    _parameters: *mut c_void,
) -> Code {
    call("cuGraphInstantiateWithParams", Need::CONTEXT, |_| {
        Err(Failure(codes::NOT_SUPPORTED))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphCreate(graph: *mut u64, flags: u32) -> Code {
    call("cuGraphCreate", Need::CONTEXT, |driver| {
        if flags != 0 {
            return driver.refuse(codes::INVALID_VALUE, "flags are not 0");
        }
        let context = driver.current()?;
        let made = driver.graphs.insert(Graph {
            context,
            nodes: [].into(),
        });
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, graph, made) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphClone(clone: *mut u64, graph: u64) -> Code {
    call("cuGraphClone", Need::CONTEXT, |driver| {
        let copy = driver.graph(graph)?.clone();
        let made = driver.graphs.insert(copy);
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, clone, made) }
    })
}

/// Returns the number of nodes; returning the nodes themselves is not supported.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetNodes(graph: u64, nodes: *mut u64, count: *mut usize) -> Code {
    call("cuGraphGetNodes", Need::CONTEXT, |driver| {
        let len = driver.graph(graph)?.nodes.len();
        if !nodes.is_null() {
            return Err(Failure(codes::NOT_SUPPORTED));
        }
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, count, len) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphUpload(exec: u64, stream: u64) -> Code {
    call("cuGraphUpload", Need::CONTEXT, |driver| {
        driver.exec(exec)?;
        let stream = driver.resolve_stream(stream)?;
        driver.forbidden_on_captured(stream)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(exec: u64, stream: u64) -> Code {
    call("cuGraphLaunch", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        driver.launch_graph(exec, stream)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: u64) -> Code {
    call("cuGraphDestroy", Need::RELEASE, |driver| {
        driver.graph(graph)?;
        driver.graphs.remove(graph);
        Ok(())
    })
}

/// Queued launches of the graph still run to their end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(exec: u64) -> Code {
    call("cuGraphExecDestroy", Need::RELEASE, |driver| {
        driver.exec(exec)?;
        driver.execs.remove(exec);
        Ok(())
    })
}

/// Always fails: the caller has to instantiate the graph again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecUpdate_v2(exec: u64, graph: u64, _result: *mut c_void) -> Code {
    call("cuGraphExecUpdate_v2", Need::CONTEXT, |driver| {
        driver.exec(exec)?;
        driver.graph(graph)?;
        Err(Failure(codes::GRAPH_EXEC_UPDATE_FAILURE))
    })
}
