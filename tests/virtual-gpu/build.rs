//! Names the library as cudarc first asks for the driver, so that it is found loaded
//! already, also where a real driver is installed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
}
