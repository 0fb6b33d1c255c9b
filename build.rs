//! Chooses the GPU kernel images to embed in the binary and writes `OUT_DIR/images.rs`, which
//! `src/device/cuda/images.rs` includes.
//!
//! The portable PTX images in `kernels/ptx` are always embedded. Release builds also embed
//! machine code for common GPUs if a CUDA toolkit is found. The toolkit is optional: without
//! it, or if it fails, the NVIDIA driver compiles the PTX when the program starts.
//!
//! `QUELL_NATIVE_KERNELS=1` embeds machine code in debug builds as well; `0` disables it in
//! every build. A list such as `80,90` embeds it in every build, for these compute capabilities
//! (8.0 and 9.0) only.

#[path = "src/device/cuda/overlap.rs"]
mod overlap;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, io};

const IMAGES: &str = "kernels/ptx";

/// Name of the variable that says which machine code to embed.
const NATIVE: &str = "QUELL_NATIVE_KERNELS";

/// Compute capabilities to embed machine code for, if the toolkit supports them: A100,
/// RTX 30, RTX 40 and L4, H100, B200, RTX 50.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

/// A portable PTX image of `kernels/NAME.cu` for one activation type.
struct Portable {
    name: String,
    activations: String,
    path: PathBuf,
}

/// Machine code assembled from a portable image.
struct Native<'a> {
    portable: &'a Portable,
    architecture: u32,
    /// File name in `OUT_DIR`.
    file: String,
}

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo:rerun-if-changed={IMAGES}");
    println!("cargo:rerun-if-changed=src/device/cuda/overlap.rs");
    for variable in [NATIVE, "NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    let portable = portable_images(Path::new(IMAGES))?;
    for image in &portable {
        // The driver expects PTX as a NUL-terminated string.
        let mut text = fs::read(&image.path)?;
        text.push(0);
        fs::write(out.join(format!("{}.ptx", image.stem())), text)?;
    }
    let native = match (architectures(), assembler()) {
        (Some(wanted), Some(ptxas)) => native_images(&ptxas, &wanted, &portable, &out)
            .unwrap_or_else(|problem| {
                println!("cargo:warning=cannot embed machine code for GPUs: {problem}");
                Vec::new()
            }),
        _ => Vec::new(),
    };
    fs::write(out.join("images.rs"), table(&portable, &native))
}

impl Portable {
    fn stem(&self) -> String {
        format!("{}.{}", self.name, self.activations)
    }
}

/// Lists the images in `folder`, sorted by name. A missing folder yields an empty list.
fn portable_images(folder: &Path) -> io::Result<Vec<Portable>> {
    let mut images = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(images),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        let file = path.file_name().and_then(|name| name.to_str());
        let parts: Vec<&str> = file.unwrap_or_default().split('.').collect();
        if let [name, activations, "ptx"] = parts[..] {
            images.push(Portable {
                name: name.to_owned(),
                activations: activations.to_owned(),
                path: path.clone(),
            });
        }
    }
    images.sort_by_key(Portable::stem);
    Ok(images)
}

/// Returns the compute capabilities to embed machine code for; `None` if there are none.
fn architectures() -> Option<Vec<u32>> {
    match env::var(NATIVE).as_deref() {
        Ok("0") => None,
        Ok("1") => Some(ARCHITECTURES.to_vec()),
        Ok(list) if !list.is_empty() => {
            let parsed: Result<Vec<u32>, _> = list.split(',').map(str::parse).collect();
            if parsed.is_err() {
                println!("cargo:warning={NATIVE} is '{list}', but must be 0, 1 or such as 80,90");
            }
            parsed.ok()
        }
        _ => (env::var("PROFILE").as_deref() == Ok("release")).then(|| ARCHITECTURES.to_vec()),
    }
}

/// Finds the toolkit's assembler, `ptxas`; returns `None` if no toolkit is found. Looks next to
/// `NVCC`, then in the `bin` folders of `CUDA_HOME` and `CUDA_PATH`, then on the search path.
fn assembler() -> Option<PathBuf> {
    let nvcc = env::var_os("NVCC").map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os);
    let search = env::var_os("PATH").unwrap_or_default();
    let folders = nvcc
        .iter()
        // `NVCC` may be a symbolic link into the toolkit.
        .flat_map(|nvcc| [Some(nvcc.clone()), nvcc.canonicalize().ok()])
        .filter_map(|nvcc| Some(nvcc?.parent()?.to_owned()))
        .chain(homes.map(|home| PathBuf::from(home).join("bin")))
        .chain(env::split_paths(&search));
    let name = format!("ptxas{}", env::consts::EXE_SUFFIX);
    let found = folders
        .map(|folder| folder.join(&name))
        .find(|path| path.is_file());
    if found.is_none() && env::var_os(NATIVE).is_some_and(|asked| asked != "0") {
        println!("cargo:warning=no machine code for GPUs is embedded: there is no CUDA toolkit");
    }
    found
}

/// Assembles every image for each of `wanted` that `ptxas` supports, on `NUM_JOBS` threads.
fn native_images<'a>(
    ptxas: &Path,
    wanted: &[u32],
    portable: &'a [Portable],
    out: &Path,
) -> Result<Vec<Native<'a>>, String> {
    let help = run(Command::new(ptxas).arg("--help"))?;
    let known = |architecture: &u32| help.contains(&format!("'sm_{architecture}'"));
    let jobs: VecDeque<Native> = portable
        .iter()
        .flat_map(|portable| {
            let supported = wanted.iter().copied().filter(known);
            supported.map(move |architecture| Native {
                portable,
                architecture,
                file: format!("{}.sm_{architecture}.cubin", portable.stem()),
            })
        })
        .collect();
    let threads = env::var("NUM_JOBS")
        .ok()
        .and_then(|count| count.parse().ok());
    let jobs = Mutex::new(jobs);
    let next = || jobs.lock().ok()?.pop_front();
    let work = || {
        let mut done = Vec::new();
        while let Some(image) = next() {
            let mut path = image.portable.path.clone();
            if image.architecture >= overlap::CAPABILITY {
                let text = fs::read_to_string(&path);
                path = out.join(&image.file).with_extension("ptx");
                text.and_then(|text| fs::write(&path, overlap::with_newer_instructions(&text)))
                    .map_err(|error| format!("{}: {error}", path.display()))?;
            }
            run(Command::new(ptxas)
                .arg(format!("-arch=sm_{}", image.architecture))
                .arg("-o")
                .arg(out.join(&image.file))
                .arg(&path))?;
            done.push(image);
        }
        Ok(done)
    };
    let parts: Vec<Result<Vec<Native>, String>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.unwrap_or(1))
            .map(|_| scope.spawn(work))
            .collect();
        let stopped = || Err("a thread panicked".to_owned());
        let results = workers.into_iter().map(|worker| worker.join());
        results
            .map(|result| result.unwrap_or_else(|_| stopped()))
            .collect()
    });
    let mut images = Vec::new();
    for part in parts {
        images.extend(part?);
    }
    images.sort_by_key(|image| (image.portable.stem(), image.architecture));
    Ok(images)
}

/// Runs the command and returns its standard output.
fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let line = said.lines().next().unwrap_or_default();
    Err(format!("{program} failed ({}): {line}", output.status))
}

/// Returns the source of `images.rs`: the tables in which the program looks up images.
fn table(portable: &[Portable], native: &[Native]) -> String {
    let mut text = String::from(
        "/// Portable images: name, activation type, NUL-terminated PTX.\n\
         pub(super) static PORTABLE: &[(&str, &str, &[u8])] = &[\n",
    );
    for image in portable {
        let Portable {
            name, activations, ..
        } = image;
        let _ = writeln!(
            text,
            "    ({name:?}, {activations:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{}.ptx\"))),",
            image.stem()
        );
    }
    text += "];\n\n";
    if !native.is_empty() {
        text += "#[repr(C, align(64))]\nstruct Aligned<T>(T);\n\n";
    }
    text += "/// Machine code: name, type of activations, compute capability (90 is 9.0), ELF image.\n\
         pub(super) static NATIVE: &[(&str, &str, u32, &[u8])] = &[\n";
    for image in native {
        let Portable {
            name, activations, ..
        } = image.portable;
        let _ = writeln!(
            text,
            "    ({name:?}, {activations:?}, {}, &Aligned(*include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{}\"))).0),",
            image.architecture, image.file
        );
    }
    text + "];\n"
}
