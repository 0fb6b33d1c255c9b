#!/usr/bin/env python3
"""Lets EleutherAI's lm-evaluation-harness score continuations as greedy or not, as its
`local-completions` model does for every multiple-choice task.

    lm_eval_client.py URL

The server's own greedy continuation of a prompt must count as greedy, and a different word
must not. Both request forms of the harness are tested: prompts as token IDs, and as text. It
uses the server's tokenizer, through /tokenizer_info and /tokenize.
"""

import json
import sys
import urllib.request

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

URL = sys.argv[1]
PROMPTS = [
    "The capital of France is",
    "One two three four",
    "Water boils at",
    "The sun rises in the",
    "Once upon a",
    "Two plus two is",
]


def completions(**body):
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(URL + "/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def main():
    with urllib.request.urlopen(URL + "/v1/models", timeout=120) as reply:
        model = json.load(reply)["data"][0]["id"]
    pairs, greedy = [], []
    for prompt in PROMPTS:
        answer = completions(model=model, prompt=prompt, max_tokens=3, temperature=0, ignore_eos=True)
        pairs += [(prompt, answer["choices"][0]["text"]), (prompt, " zebra")]
        greedy += [True, False]
    for tokenized in (True, False):
        harness = LocalCompletionsAPI(
            base_url=URL + "/v1/completions", model=model,
            tokenizer_backend="remote", tokenized_requests=tokenized,
        )
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        found = harness.loglikelihood(requests)
        counted = [is_greedy for _, is_greedy in found]
        assert counted == greedy, f"tokenized={tokenized}: {list(zip(pairs, found))}"
        likelier = [found[index][0] > found[index + 1][0] for index in range(0, len(found), 2)]
        assert all(likelier), f"tokenized={tokenized}: {list(zip(pairs, found))}"
    print(f"lm-eval: {len(greedy)} continuations counted, as token ids and as text")


if __name__ == "__main__":
    main()
