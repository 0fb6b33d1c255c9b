//! The program on the tests' GPU.

use common::{gpu, http, serve};
use serde_json::Value;
use std::process::{Command, Output};
use tempfile::TempDir;

/// Runs the program with the tests' GPU.
fn quell(args: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    command(&folder).args(args).output().unwrap()
}

/// Returns a command that runs the program with the tests' GPU, found through links in
/// `folder`.
fn command(folder: &TempDir) -> Command {
    let mut command = Command::new(common::program::path());
    if !gpu::is_real() {
        let test = std::env::current_exe().unwrap();
        let library = test.parent().unwrap().join("libvirtual_gpu.so");
        for name in ["libcuda.so", "libcuda.so.1"] {
            std::os::unix::fs::symlink(&library, folder.path().join(name)).unwrap();
        }
        command.env("LD_LIBRARY_PATH", folder.path());
    }
    command
}

fn json(output: &Output) -> Value {
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{problem}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn tiny(name: &str) -> String {
    let root = common::root();
    let path = root.join("tests/fixtures/golden/tiny/llama").join(name);
    path.to_str().unwrap().to_owned()
}

#[test]
fn inspect_shows_the_gpu_and_its_kernel_images() {
    let shown = json(&quell(&["inspect", "--device", "cuda", "--format", "json"]));
    assert_eq!(shown["device"], "cuda:0");
    let details = &shown["device_details"];
    for name in ["gpu", "compute_capability", "driver", "kernels", "memory"] {
        let value = details[name].as_str().unwrap();
        assert!(!value.is_empty(), "{name}");
    }
    let kernels = details["kernels"].as_str().unwrap();
    assert!(
        kernels.contains("PTX") || kernels.contains("sm_"),
        "{kernels}"
    );
    let text = quell(&["inspect", "--device", "cuda:0"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("compute capability"), "{text}");
}

#[test]
fn inspect_plans_a_models_memory_on_the_gpu() {
    let model = tiny("");
    let shown = json(&quell(&[
        "inspect", &model, "--device", "cuda", "--format", "json",
    ]));
    assert_eq!(shown["device"], "cuda:0");
    // 2 layers, 2 heads of 16, and keys and values of 2 bytes.
    assert_eq!(shown["memory"]["kv_bytes_per_token"], 256);
    let memory = &shown["memory"];
    for name in [
        "kv_blocks",
        "activation_bytes",
        "scratch_bytes",
        "graphs",
        "graph_bytes",
        "pinned_bytes",
    ] {
        assert!(memory[name].as_u64().unwrap() > 0, "{name}");
    }
    assert_eq!(memory["batch_tokens"], 8192);
    let text = quell(&["inspect", &model, "--device", "cuda"]);
    let text = String::from_utf8(text.stdout).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("steps "))
        .unwrap();
    for part in [
        "up to 8192 tokens",
        "of scratch memory",
        "graphs; ",
        "pinned on the host",
    ] {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn bench_runs_random_weights_on_the_gpu() {
    let config = tiny("config.json");
    let report = json(&quell(&[
        "bench",
        "--random-weights",
        &config,
        "--device",
        "cuda",
        "--prompt",
        "8",
        "--generate",
        "3",
        "--concurrency",
        "2",
        "--repetitions",
        "1",
        "--kv-cache-mib",
        "4",
        "--format",
        "json",
    ]));
    assert!(report["device"].as_str().unwrap().starts_with("cuda:0"));
    for figure in report["figures"].as_array().unwrap() {
        assert!(figure["tokens_per_s"].as_f64().unwrap() > 0.0, "{figure}");
    }
}

#[test]
fn steps_are_not_recorded_when_they_must_be_enqueued() {
    if gpu::is_real() {
        return; // it does not report what was called
    }
    let model = tiny("");
    let run = |flags: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let report = folder.path().join("report");
        let mut command = command(&folder);
        command.env("VGPU_REPORT", &report);
        command.env("VGPU_COMPUTE_CAPABILITY", "9.0");
        command.args(["generate", "--device", "cuda", "--prompt-ids", "5,6"]);
        command.args([
            "--model",
            &model,
            "--max-tokens",
            "6",
            "--kv-cache-mib",
            "4",
        ]);
        let output = command.args(flags).output().unwrap();
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{problem}");
        (output.stdout, std::fs::read_to_string(&report).unwrap())
    };
    let (recorded, report) = run(&[]);
    assert!(report.contains("cuGraphLaunch"), "{report}");
    assert!(report.contains("cuLaunchKernelEx"), "{report}");
    let (enqueued, report) = run(&["--enforce-eager", "--no-overlap"]);
    assert!(!report.contains("cuGraph"), "{report}");
    assert!(!report.contains("cuLaunchKernelEx"), "{report}");
    assert!(report.contains("cuLaunchKernel"), "{report}");
    assert_eq!(recorded, enqueued);
}

#[test]
fn a_model_that_is_too_large_for_the_gpu_is_refused_with_what_would_fit() {
    if gpu::is_real() {
        return; // its memory is not ours to choose
    }
    let model = tiny("");
    let run = |tokens: &str| {
        let folder = tempfile::tempdir().unwrap();
        let mut command = command(&folder);
        command.env("VGPU_MEMORY", "64M");
        let prompt = ["generate", "--device", "cuda", "--prompt-ids", "5,6"];
        command
            .args(prompt)
            .args(["--model", &model, "--max-tokens", "3"]);
        command.args(["--max-batch-tokens", tokens]);
        command.output().unwrap()
    };
    let refused = run("200000");
    let problem = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success(), "{problem}");
    let (_, tokens) = problem
        .split_once("a max_batch_tokens of ")
        .expect(&problem);
    let (tokens, _) = tokens.split_once(' ').unwrap();
    let fits = run(tokens);
    assert!(
        fits.status.success(),
        "{}",
        String::from_utf8_lossy(&fits.stderr)
    );
}

/// systemd or Kubernetes restarts the server only once it has exited.
#[test]
fn a_server_that_loses_its_gpu_answers_open_requests_and_exits() {
    if gpu::is_real() {
        return; // a real GPU cannot be lost on request
    }
    let folder = tempfile::tempdir().unwrap();
    let model = tiny("");
    let mut command = command(&folder);
    command.args([
        "serve", "--model", &model, "--device", "cuda", "--port", "0",
    ]);
    command.args(["--kv-cache-mib", "4", "--no-warm-up"]);
    // Fail in the middle of an answer.
    command.env("VGPU_FAIL", "cuGraphLaunch:5:LAUNCH_FAILED");
    let mut server = serve::Serve::spawn(&mut command);
    let body = r#"{"prompt": [5, 6, 7], "max_tokens": 50, "ignore_eos": true}"#;
    let request = http::post("/v1/completions", body);
    let reply = http::exchange(server.address, &request).expect("the request is answered first");
    assert!([500, 503].contains(&reply.status), "{}", reply.text());
    assert!(reply.text().contains("LAUNCH_FAILED"), "{}", reply.text());
    assert_eq!(server.ended().code(), Some(1));
}
