"""The exchange with PEFT.

    python peft.py write           writes the cases in `peft/`, which the Rust tests read
    python peft.py read FOLDER     reads what the Rust tests wrote to FOLDER, and compares outputs

For `read`, run `CANDLE_ADAPTERS_OUT=FOLDER cargo test -p candle-adapters --test peft` before.
"""

import os
import sys
import warnings
from pathlib import Path

# Before anything reads it. The models are made here; nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
# This file has the name of the package.
sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import numpy
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent / "peft"
ROWS, LENGTH, VOCABULARY = 3, 7, 40


def bert():
    """A classifier: an embedding and linear layers by a pattern, two ranks, two alphas, and the head saved whole."""
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=16,
            num_labels=3,
            attn_implementation="eager",
        )
    )
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=r".*(attention\.self\.(query|value)|(?<!attention\.)output\.dense|word_embeddings)",
        rank_pattern={"query": 2, r"layer\.1\.output\.dense": 3},
        alpha_pattern={"value": 10},
        modules_to_save=["classifier"],
    )
    return model, config


def decoder(is_tied):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=is_tied,
            attn_implementation="eager",
        )
    )


def llama():
    """A decoder: rank-stabilized scales, one layer only, and an embedding, whose base PEFT saves, too."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj", "model.embed_tokens", "embed_tokens"],
        exclude_modules=["layers.1.self_attn.v_proj"],
        layers_to_transform=[1],
    )
    return decoder(False), config


def tied():
    """A decoder whose head is the table, which is adapted."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    )
    return decoder(True), config


CASES = {"bert": bert, "llama": llama, "tied": tied}


def outputs(name, model, tokens):
    """The classifier's logits, or the decoder's for the last token."""
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
    return logits if name == "bert" else logits[:, -1]


def weights(model):
    """The model's weights, a tied one once."""
    own = model.state_dict()
    if model.config.tie_word_embeddings and "lm_head.weight" in own:
        del own["lm_head.weight"]
    return own


def load(model, path):
    own = load_file(path)
    assert set(own) == set(weights(model)), set(own) ^ set(weights(model))
    model.load_state_dict(own, strict=False)


def write():
    for number, (name, make) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model, config = make()
        with torch.no_grad():
            # Norms and biases that are not 1 and 0, and weights that make a difference.
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights(model), folder / "base.safetensors", {"format": "pt"})
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
        base = outputs(name, model, tokens)
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key or "lora_embedding_A" in key or "modules_to_save" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        adapted = outputs(name, model, tokens)
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        save_file(
            {"tokens": tokens.to(torch.uint32), "base": base.contiguous(), "outputs": adapted.contiguous()},
            folder / "case.safetensors",
        )
        print(f"{name}: {sorted(path.name for path in folder.iterdir())}, adapters move outputs by "
              f"{(adapted - base).abs().max():.3f}")


def read(folder):
    # Keys that are missing or left over are warnings of PEFT.
    warnings.simplefilter("error", UserWarning)
    # Those of a tied head are: its adapter is the table's.
    warnings.filterwarnings("ignore", r"Found missing adapter keys.*: \['base_model\.model\.lm_head\.lora_A\.")
    for name, make in CASES.items():
        model, _ = make()
        case = load_file(HERE / name / "case.safetensors")
        tokens = case["tokens"].to(torch.int64)
        written = Path(folder) / name
        expected = load_file(written / "outputs.safetensors")["outputs"]

        load(model, HERE / name / "base.safetensors")
        adapted = peft.PeftModel.from_pretrained(model, str(written))
        own = load_file(written / "adapter_model.safetensors")
        has = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        if name == "tied":
            # PEFT has the table's adapter a second time, in the head.
            has = {key: value for key, value in has.items() if "lm_head" not in key}
        assert set(own) == set(has), set(own) ^ set(has)
        assert all(torch.equal(own[key], has[key]) for key in own)
        got = outputs(name, adapted, tokens)
        moved = (expected - case["base"]).abs().max()
        print(f"{name}: PEFT on the adapter from Rust differs by {(got - expected).abs().max():.1e}, "
              f"where the adapter moves outputs by {moved:.3f}")
        assert torch.allclose(got, expected, rtol=0, atol=1e-5) and moved > 0.1

        merged, _ = make()
        load(merged, written / "merged.safetensors")
        got = outputs(name, merged, tokens)
        print(f"{name}: transformers on the merged model from Rust differs by {(got - expected).abs().max():.1e}")
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
          f"numpy {numpy.__version__}, python {sys.version.split()[0]}")
    if sys.argv[1:] == ["write"]:
        write()
    elif sys.argv[1:2] == ["read"] and len(sys.argv) == 3:
        read(sys.argv[2])
    else:
        sys.exit(__doc__)
