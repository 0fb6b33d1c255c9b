"""Makes tiny models with random weights and their embeddings, with sentence-transformers."""
import json, os, shutil, sys, pathlib, torch
from transformers import (BertConfig, BertModel, BertForSequenceClassification, XLMRobertaConfig, XLMRobertaModel,
    XLMRobertaForSequenceClassification, Gemma3TextConfig, Gemma3TextModel, Qwen3Config, Qwen3Model)
out = pathlib.Path(sys.argv[1])
torch.manual_seed(7)
def randomise(model, scale):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) * 0.1 + (1.0 if 'norm' in name.lower() and name.endswith('weight') and 'gemma' not in type(model).__name__.lower() else 0.0))
            else:
                p.copy_(torch.randn_like(p) * scale)
    return model.float().eval()
texts = [[5, 9, 40, 3, 77], list(range(1, 48)), [6], [99, 98, 97, 3, 3, 3, 50, 8, 1, 0, 2, 4]]
def save(name, model, extra=None):
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    gen = folder / 'generation_config.json'
    if gen.exists(): gen.unlink()
    return folder
def hidden(model, ids, types=None):
    with torch.no_grad():
        kw = {}
        if types is not None: kw['token_type_ids'] = torch.tensor([types])
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **kw)
def write(folder, file, value):
    path = folder / file; path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + '\n')
def st(folder, mode, dense=None, normalize=True, prompts=None, hidden_size=32):
    modules = [('', 'Transformer'), ('1_Pooling', 'Pooling')]
    write(folder, '1_Pooling/config.json', {'word_embedding_dimension': hidden_size, 'pooling_mode_cls_token': mode == 'cls', 'pooling_mode_mean_tokens': mode == 'mean', 'pooling_mode_max_tokens': False, 'pooling_mode_mean_sqrt_len_tokens': False, 'pooling_mode_weightedmean_tokens': False, 'pooling_mode_lasttoken': mode == 'last', 'include_prompt': True})
    for i, layer in enumerate(dense or []):
        name = f'{i+2}_Dense'
        modules.append((name, 'Dense'))
        o, inn = layer.weight.shape
        write(folder, f'{name}/config.json', {'in_features': inn, 'out_features': o, 'bias': layer.bias is not None, 'activation_function': 'torch.nn.modules.linear.Identity' if i == 0 else 'torch.nn.modules.activation.Tanh'})
        from safetensors.torch import save_file
        save_file({f'linear.{k}': v.contiguous() for k, v in layer.state_dict().items()}, folder / name / 'model.safetensors')
    if normalize: modules.append((f'{len(modules)}_Normalize', 'Normalize'))
    write(folder, 'modules.json', [{'idx': i, 'name': str(i), 'path': p, 'type': f'sentence_transformers.models.{t}'} for i, (p, t) in enumerate(modules)])
    if prompts: write(folder, 'config_sentence_transformers.json', prompts)
def pooled(h, mode):
    return {'mean': h.mean(0), 'cls': h[0], 'last': h[-1]}[mode]
common = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)
# BERT: mean, normalised.
bert = randomise(BertModel(BertConfig(**common, max_position_embeddings=64)), 0.15)
folder = save('bert', bert); st(folder, 'mean', prompts={'prompts': {'query': 'search: ', 'document': ''}, 'default_prompt_name': None})
write(folder, 'expected.json', [{'ids': t, 'values': torch.nn.functional.normalize(pooled(hidden(bert, t).last_hidden_state[0], 'mean'), dim=0).tolist()} for t in texts])
# XLM-RoBERTa: first token, not normalised.
xlm = randomise(XLMRobertaModel(XLMRobertaConfig(**common, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1)), 0.15)
folder = save('xlm-roberta', xlm); st(folder, 'cls', normalize=False)
# Without the padding token, whose positions differ.
xlm_texts = [[t if t != 1 else 2 for t in text] for text in texts]
write(folder, 'expected.json', [{'ids': t, 'values': pooled(hidden(xlm, t).last_hidden_state[0], 'cls').tolist()} for t in xlm_texts])
# EmbeddingGemma: windows on both sides, two linear layers.
gemma = randomise(Gemma3TextModel(Gemma3TextConfig(**{**common, 'num_hidden_layers': 3}, head_dim=16, num_key_value_heads=1, max_position_embeddings=64, sliding_window=16, layer_types=['sliding_attention', 'sliding_attention', 'full_attention'], use_bidirectional_attention=True, query_pre_attn_scalar=16)), 0.15)
dense = [torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(48, 24, bias=True)]
folder = save('gemma3-embedding', gemma); st(folder, 'mean', dense=dense)
def finish(h):
    with torch.no_grad():
        return torch.nn.functional.normalize(torch.tanh(dense[1](dense[0](pooled(h, 'mean')))), dim=0).tolist()
write(folder, 'expected.json', [{'ids': t, 'values': finish(hidden(gemma, t).last_hidden_state[0])} for t in texts])
print(json.loads((folder/'config.json').read_text()).get('sliding_window'), gemma.config.sliding_window)
# Qwen3-Embedding: last token, saved without the output projection.
qwen = randomise(Qwen3Model(Qwen3Config(**common, head_dim=16, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False)), 0.15)
folder = save('qwen3-embedding', qwen); st(folder, 'last')
write(folder, 'expected.json', [{'ids': t, 'values': torch.nn.functional.normalize(pooled(hidden(qwen, t).last_hidden_state[0], 'last'), dim=0).tolist()} for t in texts])
# Cross-encoders.
pairs = [([1, 5, 9, 2], [40, 3, 77, 2]), ([1, 8, 2], list(range(3, 40)) + [2])]
def cross(name, model, segments):
    folder = save(name, model)
    rows = []
    for a, b in pairs:
        ids, types = a + b, [0] * len(a) + [1 if segments else 0] * len(b)
        logits = hidden(model, ids, types).logits[0]
        ids = [i + 100 * s for i, s in zip(ids, types)]
        rows.append({'ids': ids, 'values': torch.sigmoid(logits).tolist()})
    write(folder, 'expected.json', rows)
cross('bert-classifier', randomise(BertForSequenceClassification(BertConfig(**common, max_position_embeddings=64, num_labels=1)), 0.2), True)
pairs = [([0, 5, 9, 2, 2], [40, 3, 77, 2]), ([0, 8, 2, 2], list(range(3, 40)) + [2])]
cross('xlm-roberta-classifier', randomise(XLMRobertaForSequenceClassification(XLMRobertaConfig(**common, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, num_labels=1)), 0.2), False)
