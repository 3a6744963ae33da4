"""Tiny Hugging Face models, made from configurations: nothing is downloaded.

In float64 these models still compute their norms, router and loss in float32, so that a change of
summation order in the last bit of a float64 appears as 1e-7. `double` takes those casts away; the
mathematics and the parameters stay those of Hugging Face.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, Inputs, random, token_ids

LENGTH = 16
IGNORED = -100
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=101, n_positions=64, n_embd=32, n_layer=2, n_head=4, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**SMALL, vocab_size=96, num_key_value_heads=2, use_cache=False)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            **SMALL, vocab_size=100, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    rest: dict[str, Any] = {"dropout_rate": 0.0, "use_cache": False, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=100, **sizes, **rest))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    # "eager" loops over nonzero() and "grouped_mm" sorts the tokens: only "batched_mm" (a gather of
    # the chosen experts' weights and a bmm) has static shapes and keeps tokens independent.
    experts: dict[str, Any] = {"num_local_experts": 4, "experts_implementation": "batched_mm"}
    return MixtralForCausalLM(
        MixtralConfig(**SMALL, **experts, vocab_size=96, num_key_value_heads=2, use_cache=False)
    )


def rms_norm_without_cast(norm: nn.Module) -> nn.Module:
    """Torch's RMS norm with the weight of Hugging Face's."""
    weight = norm.weight
    assert isinstance(weight, nn.Parameter)
    eps = norm.variance_epsilon
    assert isinstance(eps, float)
    plain = nn.RMSNorm(weight.shape[0], eps=eps, dtype=weight.dtype)
    plain.weight = weight
    return plain


class PlainRouter(nn.Module):
    """Mixtral's router without its cast to float32."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        assert isinstance(router.weight, nn.Parameter)
        assert isinstance(router.top_k, int)
        self.weight, self.top_k = router.weight, router.top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, x.shape[-1]), self.weight)
        top, chosen = torch.topk(F.softmax(logits, dim=-1), self.top_k, dim=-1)
        return logits, top / top.sum(dim=-1, keepdim=True), chosen


def causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), ignore_index=IGNORED)


def masked_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), ignore_index=IGNORED)


def wholly_in_float64(model: nn.Module, loss: Any = None) -> nn.Module:
    """`model.double()` without the float32 islands of Hugging Face's code."""
    model = model.double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in ("LlamaRMSNorm", "MixtralRMSNorm", "T5LayerNorm"):
                setattr(parent, name, rms_norm_without_cast(child))
            elif type(child).__name__ == "MixtralTopKRouter":
                setattr(parent, name, PlainRouter(child))
    if loss is not None:
        model.loss_function = loss
    return model


def causal_batch(vocab: int, step: int, batch_size: int) -> Inputs:
    ids = token_ids(step, batch_size, LENGTH, vocab=vocab)
    labels = ids.clone()
    labels[0, LENGTH // 2 :] = IGNORED
    return (), {"input_ids": ids, "labels": labels}


def bert_batch(step: int, batch_size: int) -> Inputs:
    """Rows of different lengths; one token in four is to be predicted."""
    ids = token_ids(step, batch_size, LENGTH, vocab=100)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (batch_size, 1), generator=random(step, 1))
    inside = torch.arange(LENGTH) < lengths
    chosen = inside & (torch.rand(ids.shape, generator=random(step, 2)) < 0.25)
    chosen[0, 0] = True
    labels = torch.where(chosen, ids, IGNORED)
    return (), {"input_ids": ids, "attention_mask": inside.long(), "labels": labels}


def t5_batch(step: int, batch_size: int) -> Inputs:
    labels = token_ids(step, batch_size, LENGTH // 2, vocab=100, stream=1)
    labels[0, LENGTH // 4 :] = IGNORED
    return (), {"input_ids": token_ids(step, batch_size, LENGTH, vocab=100), "labels": labels}


def loss_of_output(output: Any) -> Tensor:
    loss = output.loss
    assert isinstance(loss, Tensor)
    return loss


def _entry(name: str, build: Any, batch: Any, loss: Any = causal_loss) -> Entry:
    return Entry(name, build, batch, loss_of_output, double=partial(wholly_in_float64, loss=loss))


ENTRIES = (
    _entry("hf_gpt2", gpt2, partial(causal_batch, 101)),
    _entry("hf_llama", llama, partial(causal_batch, 96)),
    _entry("hf_bert", bert, bert_batch, masked_loss),
    _entry("hf_t5", t5, t5_batch, None),
    _entry("hf_mixtral", mixtral, partial(causal_batch, 96)),
)
