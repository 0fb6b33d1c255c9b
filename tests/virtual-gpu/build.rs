//! Names the library `libcuda.so`, the name that cudarc tries first for the driver, so that the
//! loaded virtual GPU is found even if a real driver is installed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
}
