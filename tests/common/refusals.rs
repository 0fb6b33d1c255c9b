//! Block transfers that every device must refuse, without transferring anything.

use quell::DeviceError;
use quell::internals::device::{CacheShape, Device};

fn refused(outcome: Result<(), DeviceError>, complaint: &str) {
    let error = outcome.unwrap_err();
    assert!(matches!(error, DeviceError::Failed { .. }), "{error}");
    assert!(error.to_string().contains(complaint), "{error}");
}

/// Asks for transfers of blocks and host slots that do not exist. The cache has six blocks.
pub fn blocks_and_slots_that_do_not_exist<D: Device>(
    device: &mut D,
    cache: &mut D::Cache,
    shape: &CacheShape,
) {
    assert_eq!(shape.blocks, 6);
    let mut host = device.allocate_host_blocks(shape, 2).unwrap();
    device.swap_out(cache, &mut host, &[[4, 0]]).unwrap();
    let out = device.swap_out(cache, &mut host, &[[1, 1], [6, 0]]);
    refused(out, "block 6");
    let out = device.swap_out(cache, &mut host, &[[1, 1], [1, 2]]);
    refused(out, "host slot 2");
    let back = device.swap_in(cache, &host, &[[0, 1], [0, 6]]);
    refused(back, "block 6");
    let back = device.swap_in(cache, &host, &[[0, 1], [2, 1]]);
    refused(back, "host slot 2");
    // The refused transfer left slot 1 empty.
    let back = device.swap_in(cache, &host, &[[0, 1], [1, 1]]);
    refused(back, "slot 1 holds no block");
    refused(device.copy_blocks(cache, &[[0, 1], [6, 2]]), "block 6");
    refused(device.copy_blocks(cache, &[[0, 1], [1, 2]]), "block 1");
    refused(device.copy_blocks(cache, &[[0, 1], [2, 1]]), "block 1");
    let other = CacheShape {
        layers: 1,
        ..*shape
    };
    let mut small = device.allocate_host_blocks(&other, 2).unwrap();
    refused(device.swap_out(cache, &mut small, &[[0, 0]]), "bytes");
}
