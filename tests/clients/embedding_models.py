#!/usr/bin/env python3
"""Makes the embedding models and cross-encoders of tests/fixtures/embedding.

The models are tiny and have random weights. What is expected of them is computed with transformers
and sentence-transformers. Run this by hand, with both installed, and with the folder to write to and
the folder of all-MiniLM-L6-v2 (target/references/all-minilm-l6-v2).

bert.gguf and xlm-roberta-classifier.gguf are what llama.cpp's convert_hf_to_gguf.py makes of those
folders with --outtype f32. The latter needs a vocabulary, which save_unigram makes.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import normalize
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
BERT = BertConfig(**SIZES, max_position_embeddings=64, num_labels=1)
ROBERTA = XLMRobertaConfig(
    **SIZES, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, num_labels=1
)
GEMMA = Gemma3TextConfig(
    **{**SIZES, "num_hidden_layers": 3},
    head_dim=32,
    num_key_value_heads=1,
    max_position_embeddings=64,
    query_pre_attn_scalar=32,
    sliding_window=16,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    use_bidirectional_attention=True,
)
QWEN = Qwen3Config(
    **SIZES,
    head_dim=16,
    num_key_value_heads=1,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)

TEXTS = [
    [5, 9, 40, 3, 77],
    list(range(2, 49)),
    [6],
    [99, 98, 97, 3, 3, 3, 50, 8, 7, 0, 2, 4],
]
SENTENCES = ["the cat sat on the mat", "it rains", "where is the cat ?", "a dog runs in the park"]
MINILM_TEXTS = [
    "A cat sat on a mat.",
    "Ein Kätzchen saß auf der Matte – naïve Übung!",
    "How do I free a GPU's KV cache when the client has gone?",
    "中文和日本語のテキスト",
    "x",
    "The quick brown fox jumps over the lazy dog. " * 20,
]


def randomise(model, scale):
    """Gives a model random weights that are large enough for errors to show."""
    is_gemma = isinstance(model, Gemma3TextModel)  # stores norm weights minus 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn_like(weight) * scale)
            else:
                is_norm = "norm" in name.lower() and name.endswith("weight")
                mean = 1.0 if is_norm and not is_gemma else 0.0
                weight.copy_(torch.randn_like(weight) * 0.1 + mean)
    return model.float().eval()


def run(model, ids, segments=None):
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    if segments is not None:
        inputs["token_type_ids"] = torch.tensor([segments])
    with torch.no_grad():
        return model(**inputs)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


def save(folder, model):
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def save_tokenizer(folder):
    """Writes a tokenizer of words and single letters, as BERT has them."""
    words = "the cat sat on mat it rains where is a dog runs in park ? .".split()
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in words]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(pieces[:5])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    config = {f"{name}_token": token for name, token in names.items()}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **config})


def save_unigram(folder):
    """Writes a unigram model of SentencePiece that replaces some characters."""
    from sentencepiece import SentencePieceTrainer

    random.seed(1)
    words = "the cat sat on mat it rains where is a dog runs in park".split()
    lines = [" ".join(random.choice(words) for _ in range(8)) for _ in range(400)]
    lines += ["abcdefghijklmnopqrstuvwxyz"] * 5
    (folder / "text").write_text("\n".join(lines))
    rules = {"FB01": "66 69", "9": "20", "FF21": "41", "41": "61", "3000": "20"}
    text = "".join(f"{before}\t{after}\n" for before, after in rules.items())
    (folder / "rules").write_text(text)
    SentencePieceTrainer.train(
        input=folder / "text",
        model_prefix=folder / "sentencepiece.bpe",
        vocab_size=60,
        normalization_rule_tsv=folder / "rules",
        character_coverage=1.0,
        hard_vocab_limit=False,
    )


def save_modules(folder, mode, dense=(), is_normalised=True):
    """Writes the settings of sentence-transformers."""
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken"]
    pooling = {f"pooling_mode_{one}": one == mode for one in modes}
    write(folder / "1_Pooling/config.json", {"word_embedding_dimension": 64, **pooling})
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    for layer, activation in dense:
        name = f"{len(modules)}_Dense"
        modules.append((name, "Dense"))
        outputs, inputs = layer.weight.shape
        config = {
            "in_features": inputs,
            "out_features": outputs,
            "bias": layer.bias is not None,
            "activation_function": f"torch.nn.modules.{activation}",
        }
        write(folder / name / "config.json", config)
        tensors = {f"linear.{key}": value for key, value in layer.state_dict().items()}
        save_file(tensors, folder / name / "model.safetensors")
    if is_normalised:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    write(folder / "modules.json", entries)


def expect(folder, model, texts, finish):
    """Writes what `finish` makes of the last hidden states of texts."""
    states = [run(model, ids).last_hidden_state[0] for ids in texts]
    rows = [{"ids": ids, "values": finish(own).tolist()} for ids, own in zip(texts, states)]
    write(folder / "expected.json", rows)


def embedding_models(out):
    folder, model = out / "bert", randomise(BertModel(BERT), 0.15)
    save(folder, model)
    save_tokenizer(folder)
    save_modules(folder, "mean_tokens")
    prompts = {"query": "the ", "document": ""}
    settings = {"prompts": prompts, "default_prompt_name": None}
    write(folder / "config_sentence_transformers.json", settings)
    expect(folder, model, TEXTS, lambda states: normalize(states.mean(0), dim=0))
    model = SentenceTransformer(str(folder), device="cpu")
    vectors = model.encode(SENTENCES, prompt_name="query")
    rows = [{"text": text, "ids": [], "values": v.tolist()} for text, v in zip(SENTENCES, vectors)]
    write(folder / "expected_queries.json", rows)

    folder, model = out / "xlm-roberta", randomise(XLMRobertaModel(ROBERTA), 0.15)
    save(folder, model)
    save_modules(folder, "cls_token", is_normalised=False)
    expect(folder, model, TEXTS, lambda states: states[0])

    folder, model = out / "gemma3-embedding", randomise(Gemma3TextModel(GEMMA), 0.15)
    first, second = torch.nn.Linear(64, 48, bias=False), torch.nn.Linear(48, 24)
    dense = [(first, "linear.Identity"), (second, "activation.Tanh")]
    save(folder, model)
    save_modules(folder, "mean_tokens", dense)

    def finish(states):
        with torch.no_grad():
            return normalize(torch.tanh(second(first(states.mean(0)))), dim=0)

    expect(folder, model, TEXTS, finish)

    folder, model = out / "qwen3-embedding", randomise(Qwen3Model(QWEN), 0.15)
    save(folder, model)
    save_modules(folder, "lasttoken")
    expect(folder, model, TEXTS, lambda states: normalize(states[-1], dim=0))


def expect_scores(folder, model, pairs, has_segments):
    """Writes the scores of pairs. A token of the second segment is given as its id plus 100."""
    rows = []
    for first, second in pairs:
        segments = [0] * len(first) + [int(has_segments)] * len(second)
        logits = run(model, first + second, segments).logits[0]
        ids = [token + 100 * segment for token, segment in zip(first + second, segments)]
        rows.append({"ids": ids, "values": torch.sigmoid(logits).tolist()})
    write(folder / "expected.json", rows)


def cross_encoders(out):
    folder = out / "bert-classifier"
    model = randomise(BertForSequenceClassification(BERT), 0.2)
    save(folder, model)
    save_tokenizer(folder)
    pairs = [([2, 5, 9, 3], [40, 30, 77, 3]), ([2, 8, 3], [*range(5, 40), 3])]
    expect_scores(folder, model, pairs, has_segments=True)
    query = SENTENCES[2]
    scores = CrossEncoder(str(folder), device="cpu").predict([(query, text) for text in SENTENCES])
    rows = [{"text": text, "ids": [], "values": [float(s)]} for text, s in zip(SENTENCES, scores)]
    write(folder / "expected_scores.json", rows)

    folder = out / "xlm-roberta-classifier"
    model = randomise(XLMRobertaForSequenceClassification(ROBERTA), 0.2)
    save(folder, model)
    pairs = [([0, 5, 9, 2, 2], [40, 30, 77, 2]), ([0, 8, 2, 2], [*range(3, 40), 2])]
    expect_scores(folder, model, pairs, has_segments=False)


def minilm(out, folder):
    model = SentenceTransformer(folder, device="cpu")
    rows = []
    for text, vector in zip(MINILM_TEXTS, model.encode(MINILM_TEXTS)):
        ids = model.tokenizer(text, truncation=True, max_length=256)["input_ids"]
        rows.append({"text": text, "ids": ids, "values": [round(float(x), 7) for x in vector]})
    write(out / "all-minilm-l6-v2.json", rows)


def main():
    out = Path(sys.argv[1])
    torch.manual_seed(7)
    embedding_models(out)
    cross_encoders(out)
    minilm(out, sys.argv[2])


if __name__ == "__main__":
    main()
