//! Checks that architectures are named in this folder only, that each file is registered, and that
//! each architecture has a reference checkpoint.

use super::*;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the names of the architectures' files, without `.rs`.
fn files() -> BTreeSet<String> {
    let folder = std::fs::read_dir(root().join("src/model/architectures")).unwrap();
    let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let stems = names.map(|name| name.trim_end_matches(".rs").to_owned());
    stems
        .filter(|stem| stem != "mod" && stem != "tests")
        .collect()
}

/// Returns all names of all architectures, in `config.json` and in GGUF files.
fn names() -> Vec<&'static str> {
    let of = |one: &&'static Architecture| {
        let config = [one.name].into_iter().chain(one.aliases.iter().copied());
        config.chain(gguf_names(one)).collect::<Vec<_>>()
    };
    ALL.iter().flat_map(of).collect()
}

/// Returns the names of an architecture in GGUF files.
fn gguf_names(one: &'static Architecture) -> impl Iterator<Item = &'static str> {
    let names = |format: &'static GgufFormat| [&[format.name][..], format.aliases].concat();
    one.gguf.iter().flat_map(names)
}

#[test]
fn every_file_is_registered() {
    let registry = include_str!("mod.rs");
    let files = files();
    for file in &files {
        let line = format!("&{file}::ARCHITECTURE,");
        assert!(registry.contains(&line), "{file}.rs is not in ALL");
    }
    assert_eq!(files.len(), ALL.len());
}

#[test]
fn no_two_architectures_have_a_name_in_common() {
    let mut types = BTreeSet::new();
    let mut found = BTreeSet::new();
    for one in ALL {
        for name in [one.name].iter().chain(one.aliases) {
            assert!(types.insert(*name), "two read model_type '{name}'");
            assert_eq!(Architecture::from_model_type(name).unwrap(), *one);
        }
        for name in gguf_names(one) {
            assert!(found.insert(name), "two read the GGUF name '{name}'");
            assert_eq!(Architecture::from_gguf_name(name).unwrap().0, *one);
        }
    }
}

#[test]
fn a_name_that_nobody_has_is_refused_with_the_names_that_there_are() {
    let error = Architecture::from_model_type("gemma9").unwrap_err();
    let error = error.to_string();
    assert!(error.contains("'gemma9'") && error.contains("mistral, mixtral, qwen2, "));
    let error = Architecture::from_gguf_name("gemma3_text").unwrap_err();
    let error = error.to_string();
    assert!(error.ends_with("gemma2, gemma3, gemma3n, gemma4, phi3, olmo2, granite, smollm3, seed_oss, ernie4_5, exaone4, glm4, cohere2, mistral3, gpt-oss, glm4moe, minimax-m2, llama4, lfm2, lfm2moe, granitehybrid, nemotron_h, qwen3next, qwen35, qwen35moe, deepseek2, bert"));
}

#[test]
fn every_architecture_has_a_reference() {
    let folders = ["golden/tiny", "embedding"].map(|name| root().join("tests/fixtures").join(name));
    let folders = folders.map(|folder| std::fs::read_dir(folder).unwrap());
    let types = folders.into_iter().flatten().filter_map(|folder| {
        let config = std::fs::read(folder.unwrap().path().join("config.json")).ok()?;
        let config: serde_json::Value = crate::weights::from_python_json(&config).unwrap();
        Some(config["model_type"].as_str().unwrap().to_owned())
    });
    let types: BTreeSet<String> = types.collect();
    for one in ALL {
        let mut names = [one.name].into_iter().chain(one.aliases.iter().copied());
        let name = one.name;
        assert!(
            names.any(|name| types.contains(name)),
            "{name} has no tiny checkpoint"
        );
    }
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Returns the words of a file's code, without its comments and its tests, in lower case and
/// without underscores: `Qwen3Moe` and `"qwen3_moe"` are one word.
fn words(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = code.lines().map(str::trim_start);
    let lines = lines.filter(|line| !line.starts_with("//"));
    lines
        // Some messages name this program, which is not the architecture.
        .map(|line| line.replace("llama.cpp", ""))
        .flat_map(|line| {
            let words = line.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '-');
            let words = words.map(|word| word.to_lowercase().replace('_', ""));
            words.collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn no_other_file_names_an_architecture() {
    let names: BTreeSet<String> = files()
        .into_iter()
        .chain(names().into_iter().map(str::to_owned))
        .map(|name| name.replace('_', ""))
        .collect();
    let (mut paths, mut naming) = (Vec::new(), 0);
    rust_files(&root().join("src"), &mut paths);
    for path in paths {
        let relative = path.strip_prefix(root().join("src")).unwrap();
        // These modules do not depend on models. The model names in them belong to tokenizers,
        // tool call formats and folder layouts.
        let is_below = relative.starts_with("text") || relative.starts_with("weights");
        let is_test = relative.ends_with("tests.rs")
            || relative
                .parent()
                .is_some_and(|folder| folder.ends_with("tests"));
        if is_below || is_test {
            continue;
        }
        let words = words(&std::fs::read_to_string(&path).unwrap());
        let found: Vec<&String> = words.intersection(&names).collect();
        if relative.starts_with("model/architectures") {
            naming += usize::from(!found.is_empty());
            continue;
        }
        assert!(found.is_empty(), "{} names {found:?}", path.display());
    }
    assert_eq!(naming, ALL.len() + 1, "the test reads nothing");
}
