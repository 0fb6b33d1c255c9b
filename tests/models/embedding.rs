//! Embeddings and scores equal those of sentence-transformers: of all-MiniLM-L6-v2, and of tiny
//! models with random weights, which `tests/clients/embedding_models.py` makes.

use common::embedding::{TINY, expected, fixture, largest_difference};
use common::gguf_writer::GgufWriter;
use quell::internals::weights::Gguf;
use quell::{EmbedRequest, Engine, EngineConfig, LoadOptions, PoolingStage, SubmitError};
use std::path::Path;

fn load(path: &Path, config: EngineConfig) -> Engine {
    let config = EngineConfig {
        audit: true,
        kv_cache_bytes: Some(8 << 20),
        ..config
    };
    Engine::load_with(path, config, LoadOptions::cpu()).unwrap()
}

#[test]
fn tiny_models_agree_with_sentence_transformers_in_any_batch() {
    for name in TINY {
        let engine = load(&fixture(name), EngineConfig::default());
        let all = expected(&fixture(name).join("expected.json"));
        let alone: Vec<Vec<f32>> = (all.iter())
            .map(|one| engine.embed(EmbedRequest::new(one.ids.clone())).unwrap())
            .map(|future| future.wait().unwrap().values)
            .collect();
        for (found, one) in alone.iter().zip(&all) {
            let difference = largest_difference(found, &one.values);
            assert!(difference < 1e-5, "{name} {:?}: {difference}", one.ids);
        }
        // Together, in both orders: the same bits.
        for reverse in [false, true] {
            let mut order: Vec<usize> = (0..all.len()).collect();
            if reverse {
                order.reverse();
            }
            let embed = |&index: &usize| {
                let request = EmbedRequest::new(all[index].ids.clone());
                (index, engine.embed(request).unwrap())
            };
            let futures: Vec<_> = order.iter().map(embed).collect();
            for (index, future) in futures {
                assert_eq!(future.wait().unwrap().values, alone[index], "{name}");
            }
        }
    }
}

/// The file was made by llama.cpp's converter.
#[test]
fn a_gguf_file_gives_the_embeddings_and_the_tokens_of_its_folder() {
    let (folder, file) = (
        load(&fixture("bert"), EngineConfig::default()),
        load(&fixture("bert.gguf"), EngineConfig::default()),
    );
    for one in expected(&fixture("bert").join("expected.json")) {
        let future = file.embed(EmbedRequest::new(one.ids.clone())).unwrap();
        let mut found = future.wait().unwrap().values;
        // Such files do not say that embeddings are scaled to length 1.
        let length = found.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() > 0.1);
        found.iter_mut().for_each(|x| *x /= length);
        assert!(
            largest_difference(&found, &one.values) < 1e-5,
            "{:?}",
            one.ids
        );
    }
    for text in ["the cat sat", "It rains on THE mat?", "", "zzz Ω"] {
        assert_eq!(file.tokenize(text).unwrap(), folder.tokenize(text).unwrap());
        let pair = |engine: &Engine| engine.pair_tokens(text, "a dog").unwrap();
        assert_eq!(pair(&file), pair(&folder));
    }
}

/// The file was made by llama.cpp's converter, with a vocabulary that `save_unigram` of
/// `tests/clients/embedding_models.py` makes. The ids are those of SentencePiece, moved as the
/// converter moves them.
#[test]
fn a_gguf_file_of_xlm_roberta_gives_the_scores_of_its_folder_and_the_tokens_of_sentencepiece() {
    let file = load(
        &fixture("xlm-roberta-classifier.gguf"),
        EngineConfig::default(),
    );
    for one in expected(&fixture("xlm-roberta-classifier/expected.json")) {
        let future = file.embed(EmbedRequest::new(one.ids.clone())).unwrap();
        let found = future.wait().unwrap().values;
        assert!(
            largest_difference(&found, &one.values) < 1e-5,
            "{:?}",
            one.ids
        );
    }
    let mat: &[u32] = &[5, 45, 3];
    for (text, ids) in [
        ("the cat sat", &[12, 11, 16][..]),
        ("ﬁt  Ａ\tA", &[45, 40, 29, 34, 45, 3, 6]),
        ("", &[]),
        (" mat Ω", mat),
    ] {
        let framed = [&[0], ids, &[2]].concat();
        assert_eq!(*file.tokenize(text).unwrap(), *framed, "{text:?}");
        let pair = file.pair_tokens(text, " mat Ω").unwrap();
        assert_eq!(*pair, *[&framed, &[2][..], mat, &[2]].concat(), "{text:?}");
    }
}

/// llama.cpp's converter leaves out the pooler of BERT, without which its scores are wrong.
#[test]
fn a_gguf_file_of_a_cross_encoder_without_its_pooler_is_refused() {
    let path = fixture("xlm-roberta-classifier.gguf");
    let file = Gguf::open(&path).unwrap();
    let copy = GgufWriter::copy_renamed(
        &file,
        |_| true,
        |name| name.replace("cls.weight", "cls.left"),
    );
    let (_folder, path) = copy.written();
    let error = Engine::load(&path).unwrap_err().to_string();
    assert!(error.contains("cls.weight"), "{error}");
}

#[test]
fn a_text_that_does_not_fit_in_the_rest_of_a_step_waits_for_the_next() {
    let config = EngineConfig {
        max_batch_tokens: Some(50),
        ..EngineConfig::default()
    };
    let engine = load(&fixture("bert"), config);
    assert_eq!(engine.info().context_tokens, 50);
    let all = expected(&fixture("bert").join("expected.json"));
    let futures: Vec<_> = (0..20)
        .map(|index| &all[index % all.len()])
        .map(|one| {
            (
                one,
                engine.embed(EmbedRequest::new(one.ids.clone())).unwrap(),
            )
        })
        .collect();
    for (one, future) in futures {
        let found = future.wait().unwrap().values;
        assert!(largest_difference(&found, &one.values) < 1e-5);
    }
    let error = engine.embed(EmbedRequest::new(vec![7; 51])).unwrap_err();
    assert!(matches!(error, SubmitError::InputTooLong { limit: 50, .. }));
}

#[test]
fn encoders_and_models_without_an_output_projection_generate_nothing() {
    for name in ["bert", "gemma3-embedding", "qwen3-embedding"] {
        let engine = load(&fixture(name), EngineConfig::default());
        assert!(!engine.info().generates);
        let error = engine
            .generate(quell::Request::new(vec![1, 2]))
            .unwrap_err();
        assert!(matches!(error, SubmitError::NoGeneration), "{error}");
    }
}

/// Requests with the same beginning share it in the prefix cache if only the last token counts.
#[test]
fn embeddings_of_the_last_token_use_cached_prefixes() {
    let engine = load(&fixture("qwen3-embedding"), EngineConfig::default());
    let prompt: Vec<u32> = (1..60).collect();
    let embed = |prompt: &[u32]| {
        let future = engine.embed(EmbedRequest::new(prompt.to_vec())).unwrap();
        future.wait().unwrap().values
    };
    let first = embed(&prompt);
    let before = engine.stats().unwrap().prefix_hits;
    assert_eq!(embed(&prompt), first);
    assert!(engine.stats().unwrap().prefix_hits > before);
}

#[test]
fn all_minilm_agrees_with_sentence_transformers() {
    let path = common::root().join("target/references/all-minilm-l6-v2");
    assert!(path.exists(), "run scripts/fetch-references");
    let engine = load(&path, EngineConfig::default());
    let info = engine.info();
    assert_eq!((info.embedding, info.context_tokens), (Some(384), 256));
    assert_eq!(info.pooling.stages, [PoolingStage::Normalize]);
    for one in expected(&fixture("all-minilm-l6-v2.json")) {
        let ids = engine.tokenize(one.text.as_str()).unwrap();
        assert_eq!(*ids, *one.ids, "{:?}", one.text);
        let future = engine.embed(EmbedRequest::new(one.text.as_str())).unwrap();
        let found = future.wait().unwrap().values;
        let difference = largest_difference(&found, &one.values);
        assert!(difference < 1e-4, "{:?}: {difference}", one.text);
    }
    // The second text of a pair is a segment of its own.
    let pair = engine.pair_tokens("a cat", "a dog").unwrap();
    let words = 30_522;
    let second = [1037, 3899, 102].map(|id| id + words);
    assert_eq!(pair, [&[101, 1037, 4937, 102][..], &second].concat());
}

/// Copies a fixture and changes one of its JSON files.
fn changed(name: &str, file: &str, change: impl Fn(&mut serde_json::Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&fixture(name), folder.path());
    let path = folder.path().join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    let mut value = serde_json::from_str(&text).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
    folder
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            std::fs::create_dir(&to).unwrap();
            copy(&path, &to);
        } else {
            std::fs::copy(&path, &to).unwrap();
        }
    }
}

#[test]
fn unsupported_poolings_are_refused_by_name() {
    use serde_json::json;
    type Change = fn(&mut serde_json::Value);
    let cases: [(&str, &str, Change, &str); 14] = [
        (
            "bert",
            "1_Pooling/config.json",
            |config| config["pooling_mode_max_tokens"] = json!(true),
            "max_tokens",
        ),
        (
            "bert",
            "1_Pooling/config.json",
            |config| config["include_prompt"] = json!(false),
            "include_prompt",
        ),
        (
            "bert",
            "modules.json",
            |modules| modules[2]["type"] = json!("sentence_transformers.models.LSTM"),
            "LSTM",
        ),
        // Without pooling, each token has a vector (ColBERT).
        (
            "gemma3-embedding",
            "modules.json",
            |modules| drop(modules.as_array_mut().unwrap().remove(1)),
            "Transformer, Dense",
        ),
        (
            "bert",
            "modules.json",
            |modules| modules[1]["path"] = json!("../1_Pooling"),
            "../1_Pooling",
        ),
        (
            "bert",
            "config_sentence_transformers.json",
            |config| config["similarity_fn_name"] = json!("manhattan"),
            "manhattan",
        ),
        (
            "bert",
            "config.json",
            |config| config["type_vocab_size"] = json!(0),
            "type_vocab_size",
        ),
        (
            "bert",
            "config.json",
            |config| config["type_vocab_size"] = json!(1 << 20),
            "type_vocab_size",
        ),
        (
            "xlm-roberta",
            "config.json",
            |config| config["pad_token_id"] = json!(u64::MAX),
            "pad_token_id",
        ),
        (
            "gemma3-embedding",
            "2_Dense/config.json",
            |config| config["in_features"] = json!(63),
            "in_features",
        ),
        (
            "bert",
            "config_sentence_transformers.json",
            |config| config["default_prompt_name"] = json!("passage"),
            "passage",
        ),
        (
            "gemma3-embedding",
            "2_Dense/config.json",
            |config| config["activation_function"] = json!("torch.nn.GELU"),
            "GELU",
        ),
        (
            "gemma3-embedding",
            "2_Dense/config.json",
            |config| config["out_features"] = json!(40),
            "linear.weight",
        ),
        (
            "bert-classifier",
            "config.json",
            |config| config["architectures"] = json!(["BertForTokenClassification"]),
            "TokenClassification",
        ),
    ];
    for (name, file, change, part) in cases {
        let folder = changed(name, file, change);
        let error = Engine::load_with(folder.path(), EngineConfig::default(), LoadOptions::cpu());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(part), "{part} is not in: {error}");
    }
}
