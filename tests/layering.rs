//! Checks the dependency direction in ARCHITECTURE.md: which module may use which.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The modules that each top-level module of the library may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("id", &[]),
    ("config", &[]),
    ("sampling", &[]),
    ("weights", &[]),
    ("text", &["sampling", "weights"]),
    ("cache", &["id"]),
    ("schedule", &["cache", "config", "id", "sampling"]),
    ("device", &["sampling", "weights"]),
    ("model", &["device", "weights"]),
    (
        "runner",
        // `id`: for the sequences that the runner's tests create.
        &[
            "cache", "config", "device", "id", "model", "sampling", "schedule", "text", "weights",
        ],
    ),
    (
        "engine",
        &[
            "cache", "config", "device", "id", "runner", "sampling", "schedule", "text",
        ],
    ),
    ("server", &["engine", "id", "sampling", "text"]),
];

/// The folders of the server, and the other ones of them that each may use. The files next to
/// the folders hold what all of them share, and start the server.
const SERVER_MAY_USE: &[(&str, &[&str])] = &[
    ("http", &[]),
    ("openai", &["http"]),
    ("routes", &["http", "openai"]),
];

fn source() -> PathBuf {
    common::root().join("src")
}

fn rust_files(path: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Returns every file of the library with its module and its text.
fn files() -> Vec<(String, PathBuf, String)> {
    let mut paths = Vec::new();
    rust_files(&source(), &mut paths);
    paths
        .into_iter()
        .filter_map(|path| {
            let relative = path.strip_prefix(source()).unwrap();
            let first = relative
                .components()
                .next()
                .unwrap()
                .as_os_str()
                .to_str()
                .unwrap();
            let module = first.trim_end_matches(".rs").to_owned();
            let text = std::fs::read_to_string(&path).unwrap();
            let outside = ["lib", "internals", "main", "cli"];
            (!outside.contains(&module.as_str())).then_some((module, path, text))
        })
        .collect()
}

/// Returns the top-level modules that a text names with `crate::`.
fn used(text: &str) -> BTreeSet<String> {
    let modules_in_braces = text.split("crate::{").skip(1).any(|list| {
        let list = list.split('}').next().unwrap_or_default();
        list.split(',').any(|name| name.contains("::"))
    });
    assert!(!modules_in_braces, "name the modules in lines of their own");
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| {
            rest.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect::<String>()
        })
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn modules_use_only_the_layers_they_may() {
    let allowed: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut checked = 0;
    for (module, path, text) in files() {
        let allowed = allowed
            .get(module.as_str())
            .unwrap_or_else(|| panic!("module '{module}' is not in the list of layers"));
        for name in used(&text) {
            checked += 1;
            assert!(
                name == module || allowed.contains(&name.as_str()),
                "{} uses crate::{name}, which '{module}' must not use",
                path.display()
            );
        }
    }
    assert!(
        checked > 50,
        "only {checked} uses were found: the test reads nothing"
    );
}

/// The modules that files of the program use besides the public API: `inspect` shows how a model
/// is built, and `bench` makes models without weights.
const PROGRAM_MAY_USE: &[(&str, &[&str])] = &[
    ("inspect.rs", &["model"]),
    ("bench/local.rs", &["runner", "weights"]),
];

#[test]
fn the_program_uses_the_public_api() {
    let folder = source().join("cli");
    let mut paths = Vec::new();
    rust_files(&folder, &mut paths);
    let mut exceptions = 0;
    for path in paths {
        let name = path.strip_prefix(&folder).unwrap();
        let allowed = PROGRAM_MAY_USE
            .iter()
            .find(|(file, _)| name == Path::new(file));
        let allowed = allowed.map_or(&[][..], |(_, modules)| modules);
        let text = std::fs::read_to_string(&path).unwrap();
        for module in used(&text) {
            let is_private = MAY_USE.iter().any(|(name, _)| *name == module) && module != "server";
            exceptions += usize::from(is_private);
            assert!(
                !is_private || allowed.contains(&module.as_str()),
                "{} uses crate::{module}, which is not public",
                path.display()
            );
        }
    }
    assert_eq!(exceptions, 3, "the list of exceptions is out of date");
}

/// The public API is what `lib.rs` re-exports, and the server.
#[test]
fn the_modules_of_the_library_are_private() {
    let text = std::fs::read_to_string(source().join("lib.rs")).unwrap();
    let public: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    assert_eq!(public, ["cli", "internals", "server"]);
}

#[test]
fn examples_use_the_public_api() {
    let mut paths = Vec::new();
    rust_files(&common::root().join("examples"), &mut paths);
    assert!(!paths.is_empty(), "no example was found");
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            !text.contains("internals"),
            "{} uses internals",
            path.display()
        );
    }
}

#[test]
fn the_folders_of_the_server_use_only_the_ones_below_them() {
    let folders: BTreeMap<&str, &[&str]> = SERVER_MAY_USE.iter().copied().collect();
    let mut checked = 0;
    for (_, path, text) in files() {
        let inside = path.strip_prefix(source().join("server"));
        let mut components = inside.iter().flat_map(|path| path.components());
        let Some(first) = components.next().and_then(|part| part.as_os_str().to_str()) else {
            continue;
        };
        let Some(allowed) = folders.get(first) else {
            assert!(
                components.next().is_none(),
                "src/server/{first} is not in the list of the server's folders"
            );
            continue;
        };
        for other in folders.keys().filter(|other| **other != first) {
            // Also `super::super::`, and the lists in braces.
            let named = names_server_folder(&text, other);
            checked += usize::from(named);
            assert!(
                !named || allowed.contains(other),
                "{} uses server::{other}, which '{first}' must not use",
                path.display()
            );
        }
    }
    assert!(
        checked > 20,
        "only {checked} uses were found: the test reads nothing"
    );
}

/// Returns whether a path in the text goes through the given folder of the server. `http` is
/// also a module of axum, so the segment before it must be one of this crate.
fn names_server_folder(text: &str, folder: &str) -> bool {
    let code: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| [line.trim(), " "])
        .collect();
    ["crate::server::", "super::"].iter().any(|prefix| {
        code.split(prefix).skip(1).any(|rest| {
            let names = |path: &str| {
                let path = path.trim_start();
                let rest = path.strip_prefix(folder);
                rest.is_some_and(|rest| {
                    !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_')
                })
            };
            match rest.strip_prefix('{') {
                Some(list) => list
                    .split(';')
                    .next()
                    .is_some_and(|list| list.split([',', '{']).any(names)),
                None => names(rest),
            }
        })
    })
}

#[test]
fn only_devices_contain_unsafe_code() {
    for (module, path, text) in files() {
        let has_unsafe = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .any(|line| line.contains("unsafe {") || line.contains("unsafe fn"));
        assert!(
            !has_unsafe || module == "device",
            "{} has unsafe code",
            path.display()
        );
    }
}

#[test]
fn only_the_cuda_device_uses_cudarc() {
    let mut users = 0;
    for (_, path, text) in files() {
        if text.contains("cudarc::") {
            users += 1;
            let components: Vec<_> = path.components().map(|part| part.as_os_str()).collect();
            let inside = components.windows(2).any(|pair| pair == ["device", "cuda"]);
            assert!(inside, "{} uses cudarc", path.display());
        }
    }
    assert!(users > 0, "no use was found: the test reads nothing");
}

#[test]
fn the_scheduler_threads_code_uses_no_tokio_and_no_locks() {
    for (module, path, text) in files() {
        // `waiting.rs` holds the callers' wakers for the watchdog. The scheduler thread never
        // takes that lock.
        let callers_side = module == "server"
            || ["handle.rs", "caller/session.rs", "stream.rs", "waiting.rs"]
                .iter()
                .any(|name| module == "engine" && path.ends_with(name));
        let code: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect();
        assert!(
            callers_side || !code.iter().any(|line| line.contains("tokio::")),
            "{} uses tokio",
            path.display()
        );
        let locks = code
            .iter()
            .any(|line| line.contains("Mutex<") || line.contains("RwLock<"));
        // This file replaces lock-free types under the model checkers; it is in no release
        // build.
        let checkers = path.ends_with("engine/sync/checked.rs");
        let engine_state =
            ["engine", "schedule", "cache", "runner"].contains(&module.as_str()) && !checkers;
        assert!(
            !locks || !engine_state || callers_side,
            "{} has a lock on engine state",
            path.display()
        );
    }
}

#[test]
fn the_engine_imports_sync_types_only_from_its_facade() {
    let mut users = 0;
    for (module, path, text) in files() {
        let facade = path.ends_with("engine/sync.rs") || path.ends_with("engine/sync/checked.rs");
        if module != "engine" || facade {
            continue;
        }
        users += usize::from(
            ["super::sync::", "engine::sync::"]
                .iter()
                .any(|name| text.contains(name)),
        );
        // Unit tests do not run under a model checker, so they may use the real types.
        let code = text.split("#[cfg(test)]").next().unwrap();
        for name in [
            "std::sync",
            "std::thread",
            "crossbeam_channel",
            "atomic_waker",
        ] {
            assert!(!code.contains(name), "{} names {name}", path.display());
        }
    }
    assert!(
        users > 5,
        "only {users} users were found: the test reads nothing"
    );
}

/// Returns the names that follow `path` in a text.
fn names_after<'a>(text: &'a str, path: &'a str) -> impl Iterator<Item = String> + 'a {
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(move |line| line.split(path).skip(1))
        .map(|rest| {
            let is_name = |c: &char| c.is_alphanumeric() || *c == '_';
            rest.chars().take_while(is_name).collect()
        })
}

/// Returns the names of this crate's modules that the files of a folder in `src` use, per file.
/// A folder counts as one file, and `mod.rs` as none. Tests may use anything.
fn uses_within(folder: &str) -> BTreeMap<String, BTreeSet<String>> {
    let absolute = format!("crate::{}::", folder.replace('/', "::"));
    let folder = source().join(folder);
    let mut paths = Vec::new();
    rust_files(&folder, &mut paths);
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in paths {
        let relative = path.strip_prefix(&folder).unwrap();
        let first = relative.iter().next().unwrap().to_str().unwrap();
        let name = first.trim_end_matches(".rs").to_owned();
        if name == "mod" {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let uses = uses.entry(name.clone()).or_default();
        uses.extend(names_after(code, &absolute));
        let above = "super::".repeat(relative.components().count());
        uses.extend(names_after(code, &above).filter(|name| name != "super"));
        uses.remove(&name);
    }
    uses
}

/// Fails if files of `folder` use each other in a circle, given what each uses.
fn assert_no_circle(folder: &str, mut uses: BTreeMap<String, BTreeSet<String>>) {
    let names: BTreeSet<String> = uses.keys().cloned().collect();
    for (name, used) in &uses {
        let unknown: Vec<_> = used.difference(&names).collect();
        assert!(
            unknown.is_empty(),
            "{folder}/{name}.rs uses {unknown:?}, which must be named by their files"
        );
    }
    // Remove files that use no other file, until only circles remain.
    loop {
        let before = uses.len();
        let left: BTreeSet<String> = uses.keys().cloned().collect();
        uses.retain(|_, used| !used.is_disjoint(&left));
        if uses.len() == before {
            break;
        }
    }
    assert!(
        uses.is_empty(),
        "files in {folder} use each other in a circle: {uses:?}"
    );
}

/// `mod.rs` declares the device, and each operation's file implements its part for it. Apart
/// from that, the files of a device can be read in one order.
#[test]
fn files_of_a_device_do_not_use_each_other_in_a_circle() {
    for (folder, root) in [("device/cpu", "CpuDevice"), ("device/cuda", "CudaDevice")] {
        let mut uses = uses_within(folder);
        for used in uses.values_mut() {
            used.remove(root);
        }
        assert!(
            uses.values().map(BTreeSet::len).sum::<usize>() > 40,
            "the test reads nothing"
        );
        assert_no_circle(folder, uses);
    }
}

/// Returns the module of a file in a folder, for example `bench::args` of `bench/args.rs`, and an
/// empty name for the folder's own `mod.rs`.
fn module_of(relative: &Path) -> String {
    let parts = relative.with_extension("");
    let mut parts: Vec<_> = parts.iter().map(|part| part.to_str().unwrap()).collect();
    if parts.last() == Some(&"mod") {
        parts.pop();
    }
    parts.join("::")
}

/// Returns the modules of a folder in `src` that each of its files uses, its submodules among
/// them. The folder's own `mod.rs` counts as none. Tests may use anything.
fn modules_within(folder: &str) -> BTreeMap<String, BTreeSet<String>> {
    let absolute = format!("crate::{}::", folder.replace('/', "::"));
    let folder = source().join(folder);
    let mut paths = Vec::new();
    rust_files(&folder, &mut paths);
    let modules: BTreeMap<String, String> = paths
        .iter()
        .map(|path| {
            let module = module_of(path.strip_prefix(&folder).unwrap());
            (module, std::fs::read_to_string(path).unwrap())
        })
        .collect();
    let uses = modules.iter().filter(|(module, _)| !module.is_empty());
    let uses = uses.map(|(module, text)| {
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let mut used = BTreeSet::new();
        for line in code.lines().map(str::trim_start) {
            if line.starts_with("//") {
                continue;
            }
            let declared = line
                .strip_prefix("pub ")
                .unwrap_or(line)
                .strip_prefix("mod ");
            if let Some(child) = declared.and_then(|rest| rest.strip_suffix(';')) {
                used.insert(format!("{module}::{child}"));
            }
            let grouped = [absolute.as_str(), "super::"].map(|path| path.to_owned() + "{");
            let is_grouped = grouped.iter().any(|path| line.contains(path));
            assert!(
                !is_grouped,
                "{module}: name each module that is used: {line}"
            );
            let paths = line.split(&absolute).skip(1).map(|rest| ("", rest));
            let above = line.split_once("super::").map(|(_, rest)| {
                let mut parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
                let mut rest = rest;
                while let Some(further) = rest.strip_prefix("super::") {
                    parent = parent.rsplit_once("::").map_or("", |(parent, _)| parent);
                    rest = further;
                }
                (parent, rest)
            });
            for (base, rest) in paths.chain(above) {
                let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
                let path = rest.split(|c: char| !is_path(c)).next().unwrap();
                let mut found = base.to_owned();
                for part in path.split("::") {
                    let next = [found.as_str(), part].join("::");
                    let next = next.trim_start_matches("::");
                    if !modules.contains_key(next) {
                        break;
                    }
                    found = next.to_owned();
                }
                // What `mod.rs` itself declares is no file's.
                if found.is_empty() {
                    found = path.split("::").next().unwrap().to_owned();
                }
                used.insert(found);
            }
        }
        used.remove(module);
        (module.clone(), used)
    });
    uses.collect()
}

/// Every file counts by itself, those of `cli/hub/` and `cli/bench/` too.
#[test]
fn files_of_the_program_do_not_use_each_other_in_a_circle() {
    let uses = modules_within("cli");
    let of_bench = &uses["bench::local"];
    assert!(of_bench.contains("bench::args") && of_bench.contains("progress"));
    assert!(uses["bench"].contains("bench::local"));
    assert!(
        uses.values().map(BTreeSet::len).sum::<usize>() > 50,
        "the test reads nothing"
    );
    assert_no_circle("cli", uses);
}
