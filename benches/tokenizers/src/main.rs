//! Speed of encoding next to the `tokenizers` and `fastokens` crates, on one thread.
//!
//! `RAYON_NUM_THREADS=1 cargo run --release --manifest-path benches/tokenizers/Cargo.toml [-- FILE]`
//!
//! All three read the same `tokenizer.json`, which is made of the vocabulary of Qwen 2 in
//! `target/references` (`make references`) and the settings that Qwen 2 is published with. Their ids
//! must be equal. The three run in turn, and medians of all rounds are printed, also as JSON to FILE.

use quell::internals::weights::Gguf;
use quell::internals::weights::gguf::Value as Metadata;
use quell::{EncodeOptions, Tokenizer};
use serde_json::{Map, Value, json};
use std::error::Error;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Bytes of each text.
const SIZE: usize = 1_000_000;
const ROUNDS: usize = 9;

/// How Qwen 2 splits a text before merging.
const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = root.join("target/tokenizers-bench");
    std::fs::create_dir_all(&folder)?;
    let description = description(&root)?;
    let file = folder.join("tokenizer.json");
    std::fs::write(&file, description.to_string())?;

    let quell = Tokenizer::from_folder(&folder)?;
    let peer = tokenizers::Tokenizer::from_file(&file).map_err(|error| error.to_string())?;
    let fast = fastokens::Tokenizer::from_file(&file)?;
    let encode_quell = |text: &str| quell.encode(text, EncodeOptions::default()).unwrap();
    let encode_peer = |text: &str| peer.encode_fast(text, false).unwrap().get_ids().to_vec();
    let encode_fast = |text: &str| fast.encode(text).unwrap();
    let encoders: [(&str, &dyn Fn(&str) -> Vec<u32>); 3] = [
        ("quell", &encode_quell),
        ("tokenizers", &encode_peer),
        ("fastokens", &encode_fast),
    ];

    println!(
        "MB/s, median (least – most) of {ROUNDS} rounds; of quell also for a quarter of the text"
    );
    println!("text                quell   quarter  tokenizers   fastokens  quell/tokenizers");
    let mut results = Vec::new();
    for (name, text) in texts(&root)? {
        let expected = encode_peer(&text);
        for (encoder, encode) in &encoders {
            if encode(&text) != expected {
                return Err(format!("{encoder} gives other ids for {name}").into());
            }
        }
        let quarter = &text[..text.floor_char_boundary(text.len() / 4)];
        let mut times = vec![Vec::new(); encoders.len() + 1];
        for _ in 0..ROUNDS {
            for ((_, encode), times) in encoders.iter().zip(&mut times) {
                times.push(speed(encode, &text));
            }
            times[encoders.len()].push(speed(&encode_quell, quarter));
        }
        let medians: Vec<[f64; 3]> = times.into_iter().map(spread).collect();
        let shown = |index: usize| {
            let [median, least, most] = medians[index];
            format!("{median:.1} ({least:.1} – {most:.1})")
        };
        let ratio = medians[0][0] / medians[1][0];
        println!(
            "{name:<12} {:>20} {:>8.1} {:>20} {:>20}  {ratio:.2}",
            shown(0),
            medians[3][0],
            shown(1),
            shown(2),
        );
        let columns = ["quell", "tokenizers", "fastokens", "quell_quarter"].into_iter();
        let columns = columns.zip(&medians).map(|(name, [median, least, most])| {
            (
                name.to_owned(),
                json!({"median": median, "least": least, "most": most}),
            )
        });
        let mut row: Map<String, Value> = columns.collect();
        row.insert("text".to_owned(), name.into());
        row.insert("bytes".to_owned(), text.len().into());
        row.insert("tokens".to_owned(), expected.len().into());
        row.insert("quell_per_tokenizers".to_owned(), ratio.into());
        results.push(Value::Object(row));
    }
    if let Some(path) = std::env::args().nth(1) {
        let all = json!({"unit": "MB/s", "rounds": ROUNDS, "cpu": cpu(), "texts": results});
        std::fs::write(path, serde_json::to_string_pretty(&all)? + "\n")?;
    }
    Ok(())
}

/// Returns how many megabytes of `text` are encoded per second.
fn speed(encode: &dyn Fn(&str) -> Vec<u32>, text: &str) -> f64 {
    let begin = Instant::now();
    black_box(encode(black_box(text)));
    text.len() as f64 / 1e6 / begin.elapsed().as_secs_f64()
}

/// Returns the median, the least and the largest of some numbers.
fn spread(mut numbers: Vec<f64>) -> [f64; 3] {
    numbers.sort_by(f64::total_cmp);
    [
        numbers[numbers.len() / 2],
        numbers[0],
        numbers[numbers.len() - 1],
    ]
}

/// Returns the contents of `tokenizer.json`.
fn description(root: &Path) -> Outcome<Value> {
    let path = root.join("target/references/vocabularies/ggml-vocab-qwen2.gguf");
    let file = Gguf::open(&path).map_err(|error| format!("{error}; run `make references`"))?;
    let strings = |key: &str| -> Outcome<Vec<String>> {
        let value = file.metadata(key).and_then(Metadata::as_strings);
        Ok(value.ok_or_else(|| format!("{key} is missing"))?.to_vec())
    };
    let tokens = strings("tokenizer.ggml.tokens")?.into_iter().enumerate();
    // The vocabulary is padded with tokens that no text has.
    let tokens = tokens.filter(|(_, token)| !token.starts_with("[PAD"));
    let (special, words): (Vec<_>, Vec<_>) = tokens.partition(|(_, token)| token.starts_with("<|"));
    let vocabulary = words.into_iter().map(|(id, token)| (token, id.into()));
    let vocabulary: Map<String, Value> = vocabulary.collect();
    let added = special.into_iter().map(|(id, token)| {
        json!({"id": id, "content": token, "special": true, "normalized": false,
               "single_word": false, "lstrip": false, "rstrip": false})
    });
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": strings("tokenizer.ggml.merges")?,
        },
    }))
}

/// Returns the texts, each with its name.
fn texts(root: &Path) -> Outcome<Vec<(&'static str, String)>> {
    Ok(vec![
        ("English", repeated(joined(root, "md")?)),
        ("code", repeated(joined(&root.join("src"), "rs")?)),
        ("Chinese", repeated(chinese())),
        ("spaces", " ".repeat(SIZE)),
    ])
}

/// Repeats or cuts a text to its size.
fn repeated(text: String) -> String {
    let mut all = text.repeat(SIZE / text.len() + 1);
    all.truncate(all.floor_char_boundary(SIZE));
    all
}

/// Returns sentences of random characters of the common range.
fn chinese() -> String {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |count: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % count
    };
    let mut text = String::new();
    while text.len() < SIZE {
        for _ in 0..4 + next(16) {
            text.extend(char::from_u32(0x4e00 + next(6000) as u32));
        }
        text.push(['，', '。', '、', '\n'][next(4) as usize]);
    }
    text
}

/// Joins the files below a folder that have this extension, in the order of their names, without
/// those that were built or downloaded.
fn joined(folder: &Path, extension: &str) -> Outcome<String> {
    let mut paths = Vec::new();
    collect(folder, extension, &mut paths)?;
    paths.sort();
    let mut text = String::new();
    for path in paths {
        text += &std::fs::read_to_string(path)?;
    }
    Ok(text)
}

fn collect(folder: &Path, extension: &str, paths: &mut Vec<PathBuf>) -> Outcome<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with('.') || ["target", "models", "fixtures"].contains(&&*name) {
            continue;
        }
        if path.is_dir() {
            collect(&path, extension, paths)?;
        } else if path.extension().is_some_and(|own| own == extension) {
            paths.push(path);
        }
    }
    Ok(())
}

/// Returns the name of the processor.
fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split(':').nth(1));
    name.unwrap_or("unknown").trim().to_owned()
}
