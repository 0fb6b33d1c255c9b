"""Records the token ids that SentencePiece gives texts with the vocabulary of XLM-R.

    sentencepiece_ids.py ggml-vocab-nomic-bert-moe.gguf ggml-vocab-qwen2.gguf.inp

Needs the packages gguf, protobuf and sentencepiece. The texts are those of the second file, and some
that the vocabulary's map of characters changes. Prints JSON for
tests/fixtures/text/sentencepiece_unigram.json.
"""

import json
import sys

from gguf import GGUFReader
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

TEXTS = [
    "ﬁne ﬂow", "ＡＢＣ　ｄｅｆ", "①②③ ½ ㎏", "e\u0301 é ñ n\u0303", "tab\tnew\nline\r\n",
    "zero\u200bwidth\u200djoin\ufeff", "ﷺ", "  lead and   trail  ", "한국어 \u1112\u1161\u11ab",
    "ﾊﾛｰ ﾜｰﾙﾄﾞ", "ΑΒΓ ά", "ǆ Ǆ", "𝒽𝑒𝓁𝓁𝑜", "\u0000a\u0001b", "soft\u00adhyphen", "…‥ “quotes” ‘x’",
    "🤗 😀👨‍👩‍👧", "ไทยภาษา สวัสดี", "हिन्दी में", "\u202ertl\u202c مرحبا", "\u0344\u0374\u037e", "a" * 300,
    "한" * 50, "x  \u3000 y",
]  # fmt: skip
SEPARATOR = "\n__ggml_vocab_test__\n"


def main(vocabulary, texts):
    fields = GGUFReader(vocabulary).fields
    value = lambda name: fields[f"tokenizer.ggml.{name}"].contents()
    model = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(value("tokens"), value("scores"), value("token_type")):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.bos_id = value("bos_token_id")
    model.trainer_spec.eos_id = value("eos_token_id")
    model.trainer_spec.unk_id = value("unknown_token_id")
    model.trainer_spec.pad_id = value("padding_token_id")
    model.normalizer_spec.precompiled_charsmap = bytes(value("precompiled_charsmap"))
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.SerializeToString())
    with open(texts, encoding="utf-8", newline="") as file:
        all_texts = file.read().removesuffix(SEPARATOR).split(SEPARATOR) + TEXTS
    cases = [{"text": text, "ids": processor.EncodeAsIds(text)} for text in all_texts]
    print("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]")


main(*sys.argv[1:])
