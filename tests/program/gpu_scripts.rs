//! The scripts for a machine with a GPU, run with programs that stand in for quell's: what they
//! write when a program hangs or crashes, and when the time is over. `make test` also runs
//! `scripts/gpu/first-hour` with the real programs, on the virtual GPU.

#![cfg(unix)]

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// Describes a GPU, and measures a model.
const QUELL: &str = r#"
case $1 in
    inspect) echo '{"device_details": {"gpu": "a stand-in", "driver": "none"}}' ;;
    bench) echo '{"figures": [{"name": "decode", "tokens_per_s": 1.0}]}' ;;
esac"#;

/// A measurement, after which the results so far are copied.
const KERNELS: &str = r#"
cp "$(dirname "$2")"/*.json "$(dirname "$2")/.."
cat > "$2" <<END
{"device": "a stand-in", "copy_tb_per_s": 1.0, "left_out": [], "kernels": [{
    "kernel": "linear BF16", "shape": "any", "rows": 1, "sizes": {}, "bytes": 1000,
    "operations": 1000, "microseconds": 1.0, "tb_per_s": 0.001, "tflop_per_s": 0.001,
    "share_of_copy": 0.001}]}
END"#;

/// Tests that pass; those of `recorded` write a result.
const TESTS: &str = r#"
if [ "$1" = recorded:: ]; then mkdir -p "$QUELL_RECORD"; echo 1234 > "$QUELL_RECORD/one.f32"; fi
echo "test result: ok. 1 passed; 0 failed; 0 ignored""#;

/// A pack of programs that are shell scripts.
struct Stand {
    folder: TempDir,
}

impl Stand {
    /// Puts `special` before what the CUDA tests do otherwise.
    fn new(special: &str) -> Self {
        let stand = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let manifest = json!({
            "root": common::root(),
            "commit": "0000000",
            "optimised": false,
            "tests": ["device", "engine", "recorded", "rowwise"],
        });
        fs::create_dir(stand.path("bin")).unwrap();
        fs::write(stand.path("bin/manifest.json"), manifest.to_string()).unwrap();
        stand.program("bin/quell", QUELL);
        stand.program("bin/kernels", KERNELS);
        stand.program("bin/cuda", &format!("{special}\n{TESTS}"));
        stand
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn program(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Runs a script with a limit. Programs in the folder `tools` come first on the path.
    fn run(&self, script: &str, seconds: u32) -> (Output, Value) {
        let path = std::env::var("PATH").unwrap();
        let output = Command::new("python3")
            .arg(common::root().join("scripts/gpu").join(script))
            .arg("--pack")
            .arg(self.folder.path())
            .args(["--seconds", &seconds.to_string()])
            .env_remove("CUDA_CACHE_PATH")
            .env("PATH", format!("{}:{path}", self.path("tools").display()))
            .output()
            .unwrap();
        let file = self.path("results").join(format!("{script}.json"));
        let text = fs::read_to_string(&file).unwrap_or_else(|error| {
            let said = String::from_utf8_lossy(&output.stderr);
            panic!("{}: {error}: {said}", file.display())
        });
        (output, serde_json::from_str(&text).unwrap())
    }
}

/// Returns the state of an item.
fn state<'a>(results: &'a Value, name: &str) -> &'a str {
    let items = results["items"].as_array().unwrap();
    let found = items.iter().find(|item| item["name"] == name);
    found.unwrap_or_else(|| panic!("{name} is not in {results:#}"))["state"]
        .as_str()
        .unwrap()
}

/// Returns whether one of the texts in a list begins with `start` and contains `part`.
fn says(list: &Value, start: &str, part: &str) -> bool {
    let mut texts = list
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap());
    texts.any(|text| text.starts_with(start) && text.contains(part))
}

/// Checks that little has to be copied from a machine that is paid for by the minute: at most 8
/// files of at most 16 MiB.
fn assert_small(folder: &Path) {
    let files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap())
        .collect();
    assert!(files.len() <= 8, "{files:?}");
    for file in files {
        assert!(file.metadata().unwrap().len() <= 16 << 20, "{file:?}");
    }
}

#[test]
fn the_results_are_there_after_every_item() {
    let stand = Stand::new(r#"touch "$CUDA_CACHE_PATH/written""#);
    let (output, results) = stand.run("first-hour", 460);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(
        (&results["ok"], &results["finished"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(results["recorded"], 1);
    assert_eq!(results["tests"].as_array().unwrap().len(), 4);
    assert_eq!(results["models"].as_array().unwrap().len(), 4);
    assert_eq!(results["kernels"].as_array().unwrap().len(), 1);
    for file in ["recorded.tar", "roofline.svg"] {
        assert!(stand.path("results").join(file).exists(), "{file}");
    }
    assert_small(&stand.path("results"));
    // The driver's cache is where it can be written, whatever the home folder is.
    assert!(stand.path("cache/written").exists());
    // What was there while the kernels were measured.
    let during = fs::read_to_string(stand.path("first-hour.json")).unwrap();
    let during: Value = serde_json::from_str(&during).unwrap();
    assert_eq!(
        (&during["ok"], &during["finished"]),
        (&json!(false), &json!(false))
    );
    assert_eq!(during["tests"], results["tests"]);
}

/// The children of a program are ended with it.
#[test]
fn a_program_that_hangs_takes_only_its_own_time() {
    let pid = r#"sleep 3600 & echo $! > "$(dirname "$0")/../child"; wait"#;
    let stand = Stand::new(&format!("if [ $1 = engine:: ]; then {pid}; fi"));
    let (output, results) = stand.run("first-hour", 30);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        (&results["ok"], &results["finished"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(state(&results, "test engine"), "out of time");
    assert!(says(&results["problems"], "test engine: ", "out of time"));
    assert_eq!(state(&results, "test rowwise"), "done");
    assert_eq!(state(&results, "kernels"), "done");
    let child = fs::read_to_string(stand.path("child")).unwrap();
    let left = Path::new("/proc").join(child.trim());
    let stat = fs::read_to_string(left.join("stat"));
    assert!(
        stat.is_err() || stat.unwrap().contains(") Z "),
        "{child} still runs"
    );
}

#[test]
fn a_model_that_hangs_takes_only_its_own_time() {
    let stand = Stand::new("");
    let hang = r#"case "$*" in *" q4_k "*) sleep 3600 ;; esac"#;
    stand.program("bin/quell", &format!("{hang}\n{QUELL}"));
    let (output, results) = stand.run("first-hour", 30);
    assert_eq!(output.status.code(), Some(1));
    let hung = "llama-3.1-8b q4_k --prompt 0 --concurrency 1 --generate 128";
    assert_eq!(state(&results, hung), "out of time");
    let others = results["models"].as_array().unwrap();
    assert_eq!(others.len(), 3, "{results:#}");
}

/// The cache would be where a file is. Everything runs without it.
#[test]
fn without_a_folder_for_the_cache_of_the_driver_everything_runs() {
    let stand = Stand::new(r#"[ "$CUDA_CACHE_DISABLE" = 1 ] || exit 3"#);
    fs::write(stand.path("cache"), "").unwrap();
    let (output, results) = stand.run("first-hour", 460);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("cache cannot be written"), "{said}");
    assert_eq!(results["models"].as_array().unwrap().len(), 4);
}

#[test]
fn a_program_that_crashes_is_named_and_its_output_kept() {
    let crash = "yes 'a long line' | head -c 40000000; kill -SEGV $$";
    let stand = Stand::new(&format!("if [ $1 = device:: ]; then {crash}; fi"));
    let (output, results) = stand.run("first-hour", 460);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(state(&results, "test device"), "ended by SIGSEGV");
    assert!(says(&results["problems"], "test device: ", "SIGSEGV"));
    assert_eq!(results["tests"][1]["state"], "failed");
    assert_eq!(state(&results, "test rowwise"), "done");
    let logs = Command::new("tar")
        .arg("-tf")
        .arg(stand.path("results/logs.tar"))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(logs.stdout).unwrap(), "test-device.log\n");
    assert_small(&stand.path("results"));
}

#[test]
fn what_no_time_is_left_for_is_listed() {
    let stand = Stand::new("if [ $1 = recorded:: ]; then sleep 3600; fi");
    let (output, results) = stand.run("first-hour", 5);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        (&results["ok"], &results["finished"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(state(&results, "test recorded"), "out of time");
    for item in ["test rowwise", "kernels", "llama-3.1-8b"] {
        assert!(
            says(&results["left_out"], item, "no time was left"),
            "{item}: {results:#}"
        );
    }
}

#[test]
fn without_a_gpu_the_results_say_so() {
    let stand = Stand::new("");
    stand.program(
        "bin/quell",
        "echo 'error: there is no NVIDIA driver' >&2; exit 1",
    );
    for script in ["first-hour", "check", "bench"] {
        let (output, results) = stand.run(script, 460);
        assert_eq!(output.status.code(), Some(1), "{script}");
        assert_eq!(
            (&results["ok"], &results["finished"]),
            (&json!(false), &json!(true))
        );
        assert!(says(
            &results["problems"],
            "description of the GPU",
            "no NVIDIA driver"
        ));
        assert_eq!(results["items"].as_array().unwrap().len(), 1, "{script}");
    }
}

/// On some machines, it is installed and refuses the device.
#[test]
fn a_sanitizer_that_does_not_work_is_not_available() {
    let stand = Stand::new("");
    stand.program(
        "tools/compute-sanitizer",
        "echo 'Device not supported'; exit 1",
    );
    for script in ["first-hour", "check"] {
        let (output, results) = stand.run(script, 460);
        assert!(output.status.success(), "{script}: {results:#}");
        assert_eq!(
            state(&results, "probe of compute-sanitizer"),
            "not available"
        );
        assert!(says(
            &results["left_out"],
            "compute-sanitizer",
            "not available"
        ));
    }
    // One that works runs the recording.
    stand.program("tools/compute-sanitizer", "exit 0");
    let (_, results) = stand.run("first-hour", 460);
    assert_eq!(state(&results, "memcheck on the recording"), "done");
    assert!(!says(&results["left_out"], "compute-sanitizer", ""));
}

#[test]
fn check_and_bench_keep_to_their_limit_and_write_what_they_have() {
    let stand = Stand::new("if [ $1 = engine:: ]; then sleep 3600; fi");
    let (output, results) = stand.run("check", 20);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(state(&results, "test engine"), "out of time");
    assert_eq!(state(&results, "test rowwise"), "done");
    assert!(results["seconds"].as_u64().unwrap() <= 20, "{results:#}");

    stand.program("bin/kernels", &format!("{KERNELS}\nsleep 3600"));
    let (output, results) = stand.run("bench", 20);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(state(&results, "kernels"), "out of time");
    // What it had measured before it hung.
    assert_eq!(results["kernels"].as_array().unwrap().len(), 1);
    assert_eq!(results["models"].as_array().unwrap().len(), 8);
    assert!(results["seconds"].as_u64().unwrap() <= 20, "{results:#}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("linear BF16"), "{table}");
}

#[test]
fn times_of_the_virtual_gpu_are_never_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let (input, picture) = (folder.path().join("a.json"), folder.path().join("a.svg"));
    let draw = |device: Value| {
        let kernel = json!({
            "kernel": "linear <BF16>", "shape": "any", "rows": 1, "bytes": 1e6, "operations": 2e6,
            "microseconds": 1.0, "tb_per_s": 1.0, "tflop_per_s": 2.0,
        });
        let results = json!({"device": device, "copy_tb_per_s": 4.0, "kernels": [kernel]});
        fs::write(&input, results.to_string()).unwrap();
        let script = common::root().join("scripts/gpu/roofline");
        let mut command = Command::new("python3");
        command
            .arg(script)
            .arg(&input)
            .arg(&picture)
            .output()
            .unwrap()
    };
    for device in [
        json!("cuda:0 quell virtual GPU"),
        json!({"gpu": "quell virtual GPU"}),
        json!({"gpu": "another name", "virtual": true}),
    ] {
        let output = draw(device);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("say nothing about a GPU"), "{said}");
        assert!(!picture.exists());
    }
    let output = draw(json!({"gpu": "NVIDIA H200", "virtual": false}));
    assert!(output.status.success(), "{output:?}");
    let svg = fs::read_to_string(&picture).unwrap();
    assert!(
        svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"),
        "{svg}"
    );
    assert!(
        svg.contains("linear &lt;BF16&gt;, any, 1 rows: 1.0 µs, 1.00 TB/s"),
        "{svg}"
    );
}
