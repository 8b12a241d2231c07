"""Claims about finetune.py: an adapter changes nothing until it has learned, and then means the same beside
the weights, inside them and in a file of any of the three namings; what is no such file, or of another model,
is named. DPO learns a preference, by its formula, and nothing else moves."""
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import flow
from conftest import refuses
from finetune import Lora, adapters, add_lora, change_all, dpo_loss, merge_lora, save_lora, without_lora
from kernels.int8 import quantise_mmdit
from layouts import mmdit_folder
from mmdit import MMDiT, MMDiTConfig
from weights import load_mmdit, save_mmdit

C = MMDiTConfig(depth=3, heads=2, head_dim=8, in_channels=4, context_dim=24, pooled_dim=12, pos_max=8,
                qk_norm=True, dual_blocks=1)


def model(seed=0, config=C):
    """As if trained: nothing is zero."""
    torch.manual_seed(seed)
    net = MMDiT(config)
    for p in net.parameters():
        p.data = torch.randn_like(p) * 0.2
    return net.requires_grad_(False)


def inputs(B=2):
    g = torch.Generator().manual_seed(1)
    shapes = {"x": (B, 4, 6, 8), "context": (B, 5, 24), "pooled": (B, 12)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} | {
        "t": torch.linspace(0.2, 0.9, B)}


def learned(net, rank=2, alpha=None, seed=3):
    """With adapters as if these had been trained."""
    add_lora(net, rank, alpha)
    g = torch.Generator().manual_seed(seed)
    for layer in adapters(net).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=g) * 0.3
    return net


# ------------------------------------------------------------------------------------------------- learning

def test_new_adapters_change_no_bit_and_they_alone_learn():
    net, x = model().requires_grad_(), inputs()
    before = net(**x)
    add_lora(net, 2)
    assert torch.equal(net(**x), before)
    net(**x).square().sum().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None}
    assert moved == {name for name, p in net.named_parameters() if "lora_" in name} != set()
    # every matrix of the blocks has one, but for that of which rows are cut off
    linears = {name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear) and "blocks" in name}
    assert linears - adapters(net).keys() == {"joint_blocks.2.context_block.attn.qkv"}


@given(rank=st.integers(1, 8), alpha=st.none() | st.floats(0.125, 20, width=32), dtype=st.sampled_from(
    [torch.float32, torch.bfloat16]))
def test_beside_the_weights_inside_them_and_in_a_file_an_adapter_means_the_same(tmp_path_factory, rank, alpha,
                                                                               dtype):
    net, x = learned(model().to(dtype), rank, alpha), inputs()
    file = tmp_path_factory.mktemp("lora") / "a.safetensors"
    beside = net(**x).float()
    with without_lora(net):
        assert torch.equal(net(**x), model().to(dtype)(**x))
    assert torch.equal(net(**x).float(), beside)
    save_lora(net, file)
    read, inside = change_all(model().to(dtype), [Lora(file)]), merge_lora(net)
    assert not adapters(inside) and inside.state_dict().keys() == read.state_dict().keys()
    assert all(torch.equal(t, read.state_dict()[name]) for name, t in inside.state_dict().items())
    error = (inside(**x).float() - beside).norm() / beside.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(ValueError, match="it must be 1 to 16"):
        add_lora(model(), rank)
    add_lora(model(), 16)


# ----------------------------------------------------------------------------------------------------- files

def other_namings(file, tmp_path):
    """The same adapter as kohya's scripts and as diffusers would write it."""
    tensors, kohya, folder = load_file(file), {}, {}
    for stem in {key.rsplit(".", 2)[0] for key in tensors if key.endswith("A.weight")}:
        A, B, alpha = (tensors[f"{stem}.{leaf}"] for leaf in ("lora_A.weight", "lora_B.weight", "alpha"))
        name = stem.removeprefix("diffusion_model.")
        flat = f"lora_unet_{name.replace('.', '_')}"
        kohya |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": alpha}
        recipe = mmdit_folder(C.depth)(f"{name}.weight")
        rows = [B.roll(len(B) // 2, 0)] if recipe.op == "swap" else B.chunk(len(recipe.keys))
        for key, row in zip(recipe.keys, rows):
            place = f"transformer.{key.removesuffix('.weight')}"
            folder |= {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": row * alpha / len(A)}
    save_file({k: t.contiguous() for k, t in kohya.items()}, tmp_path / "kohya.safetensors")
    save_file({k: t.clone() for k, t in folder.items()}, tmp_path / "diffusers.safetensors")
    return tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "ours.safetensors"
    save_lora(learned(model(), 3, 1.5), path)
    return path


def test_all_namings_say_the_same(file, tmp_path):
    files = file, *other_namings(file, tmp_path), tmp_path / "twice.safetensors"
    save_file({f"transformer.base_model.model.{key.removeprefix('transformer.')}": t
               for key, t in load_file(files[2]).items()}, files[3])                # SimpleTuner's, once
    ours, *others = (change_all(model(), [Lora(f)]).state_dict() for f in files)
    for other in others:
        assert all(torch.allclose(t, ours[name], atol=1e-6) for name, t in other.items())
    untouched = {name for name, t in model().state_dict().items() if torch.equal(t, ours[name])}
    assert not any(name.endswith("mlp.fc1.weight") for name in untouched) and "pos_embed" in untouched


@given(strength=st.floats(-2, 2), again=st.floats(-1, 1))
def test_strengths_scale_the_change_and_several_add_up(file, strength, again):
    plain, whole = model().state_dict(), change_all(model(), [Lora(file)]).state_dict()
    some = change_all(model(), [Lora(file, strength), Lora(file, again)]).state_dict()
    for name, t in some.items():
        assert torch.allclose(t, plain[name] + (strength + again) * (whole[name] - plain[name]), atol=1e-5)


@pytest.mark.parametrize("layout", ["single_file", "folder"])
@pytest.mark.parametrize("int8", [False, True])
def test_weights_are_changed_while_they_are_read_and_before_they_become_8_bits(file, tmp_path, layout, int8):
    base = tmp_path / ("base.safetensors" if layout == "single_file" else "base")
    save_mmdit(model(), base, layout)
    read = load_mmdit(base, int8=int8, loras=[Lora(file)]).state_dict()
    expected = change_all(model(), [Lora(file)])
    expected = (quantise_mmdit(expected) if int8 else expected).state_dict()
    assert read.keys() == expected.keys() and all(torch.equal(read[name], t) for name, t in expected.items())


@pytest.mark.parametrize("about, scale", [
    ('{}', 1), ('{"transformer.lora_alpha": 6}', 2),
    ('{"transformer.lora_alpha": 6, "transformer.use_rslora": true}', 6 / math.sqrt(3)),
    ('{"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"attn.to_out.0": 1.5}}', 0.5)])
def test_without_alpha_the_metadata_tell_the_scale_or_it_is_one(tmp_path, about, scale):
    key, A, B = "transformer.transformer_blocks.1.attn.to_out.0", torch.randn(3, 16), torch.randn(16, 3)
    save_file({f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, tmp_path / "a.safetensors",
              {"lora_adapter_metadata": about})
    changed = change_all(model(), [Lora(tmp_path / "a.safetensors")]).state_dict()
    name = "joint_blocks.1.x_block.attn.proj.weight"
    assert torch.allclose(changed[name] - model().state_dict()[name], scale * B @ A, atol=1e-5)


@pytest.mark.parametrize("beside, scale", [
    ({"lora_alpha": 6}, 2), ({"lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(3)),
    ({"lora_alpha": 6, "alpha_pattern": {"to_out.0": 1.5, "to_q": 9}}, 0.5)])
def test_what_peft_has_saved_tells_its_scale_beside_it_and_other_files_do_not_look_there(
        tmp_path, beside, scale):
    A, B, name = torch.randn(3, 16), torch.randn(16, 3), "joint_blocks.1.x_block.attn.proj.weight"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, **beside}))
    for prefix, expected in (("base_model.model.", scale), ("transformer.", 1)):
        key = f"{prefix}transformer_blocks.1.attn.to_out.0"
        save_file({f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, tmp_path / "a.safetensors")
        changed = change_all(model(), [Lora(tmp_path / "a.safetensors")]).state_dict()
        assert torch.allclose(changed[name] - model().state_dict()[name], expected * B @ A, atol=1e-5)


def test_factors_of_other_shapes_are_refused(tmp_path):
    conv = "diffusion_model.x_embedder.proj"
    for A, B, key in ((torch.ones(2, 15), torch.ones(16, 2), KEY),
                      (torch.ones(2, 4, 2, 2), torch.ones(16, 2, 2, 2), conv)):
        save_file({f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, tmp_path / "a.safetensors")
        refuses(lambda: change_all(model(), [Lora(tmp_path / "a.safetensors")]), "another model", key)


def test_a_layer_that_is_changed_under_two_names_is_refused(tmp_path):
    save_file(factors() | factors(key=KEY.removeprefix("diffusion_model.")), tmp_path / "a.safetensors")
    refuses(lambda: change_all(model(), [Lora(tmp_path / "a.safetensors")]), "twice", "damaged")


def test_an_embedders_convolution_can_be_changed_too(tmp_path):
    A, B = torch.randn(2, 4, 2, 2), torch.randn(16, 2, 1, 1)
    key = "diffusion_model.x_embedder.proj.lora_"
    save_file({f"{key}down.weight": A, f"{key}up.weight": B}, tmp_path / "a.safetensors")
    name, kernel = "x_embedder.proj.weight", torch.einsum("orxy,rchw->ochw", B, A)
    changed = change_all(model(), [Lora(tmp_path / "a.safetensors")]).state_dict()
    assert torch.allclose(changed[name] - model().state_dict()[name], kernel, atol=1e-5)


def test_what_is_for_text_encoders_is_left_out_and_counted(file, tmp_path):
    more = {f"{stem}.lora_{leaf}.weight": torch.ones(2, 2) for leaf in ("down", "up") for stem in (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "clip_g.text_model.encoder.layers.0.mlp.fc1", "t5.encoder.block.0.layer.0.SelfAttention.q")}
    more["bundle_emb.my-style.clip_l"] = torch.ones(2, 768)             # OneTrainer's
    save_file(load_file(file) | more | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())},
              tmp_path / "more.safetensors")
    lora = Lora(tmp_path / "more.safetensors")
    assert (lora.left_out, Lora(file).left_out) == (10, 0)
    assert lora.factors.keys() == Lora(file).factors.keys()


KEY = "diffusion_model.joint_blocks.0.x_block.attn.proj"


def factors(rank=2, key=KEY, name=""):
    return {f"{key}.lora_A{name}.weight": torch.ones(2, 16),
            f"{key}.lora_B{name}.weight": torch.ones(16, rank)}


def test_an_adapter_that_peft_has_named_is_read(tmp_path):
    for name in (".default", ".my-style_0"):
        of_text = factors(key="text_encoder.text_model.encoder.layers.0.mlp.fc1")      # by another name
        save_file(factors(name=name) | of_text, tmp_path / "a.safetensors")
        lora = Lora(tmp_path / "a.safetensors")
        assert lora.factors.keys() == {KEY} and lora.left_out == 2


@pytest.mark.parametrize("tensors, words", [
    ({"joint_blocks.0.x_block.attn.qkv.weight": torch.ones(2, 2)}, ("it is an SD3 transformer", "--model")),
    ({"something": torch.ones(2)}, ("no factors of a LoRA", "something")),
    ({f"{KEY}.lora_A.weight": torch.ones(2, 16)}, ("damaged", f"{KEY}")),
    (factors(3), ("damaged", KEY)), (factors() | {f"{KEY}.dora_scale": torch.ones(16)}, ("DoRA",)),
    ({f"{KEY}.hada_w1_a": torch.ones(2, 16)}, ("LoHa",)),
    (factors() | {f"{KEY}.more": torch.ones(16)}, ("unknown", f"{KEY}.more")),
    (factors() | {f"{KEY}.alpha": torch.ones(2)}, ("the scale of", KEY)),
    (factors() | {f"{KEY}.alpha": torch.tensor(math.inf)}, ("the scale of", "inf")),
    ({key: t[:0] if "A" in key else t[:, :0] for key, t in factors().items()}, ("damaged", KEY)),
    ({key: t.int() for key, t in factors().items()}, ("damaged", KEY)),
    (factors(key="lora_te1_text_model_x"), ("text encoders alone", "leave it out")),
    (factors(name=".a") | factors(name=".b"), ("several adapters (.a, .b)", "save one")),
    ({f"{KEY}.lora_linear_layer.down.weight": torch.ones(2, 16)}, ("a naming that is not read here", KEY)),
])
def test_what_is_no_plain_lora_is_named(tensors, words, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    refuses(lambda: Lora(tmp_path / "a.safetensors"), "a.safetensors", *words)


def test_files_that_are_damaged_missing_or_pickled_are_named(file, tmp_path):
    refuses(lambda: Lora(tmp_path / "none.safetensors"), "none.safetensors", "missing")
    for name, data in (("cut", file.read_bytes()[:-9]), ("pickled", b"\x80\x04N.")):
        (tmp_path / name).write_bytes(data)
        refuses(lambda: Lora(tmp_path / name), name, name)


@pytest.mark.parametrize("other, words", [
    (replace(C, depth=2), ("another model", "96 x 16", "32 x 16")),
    (replace(C, heads=3), ("another model", "this model's is 144 x 24")),
    (replace(C, dual_blocks=0), ("another model", "this model's is 96 x 16"))])
def test_an_adapter_of_another_model_is_refused_before_anything_is_changed_or_read(
        file, tmp_path, other, words):
    net = model(config=other)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    refuses(lambda: change_all(net, [Lora(file)]), "ours.safetensors", *words)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    save_mmdit(net, tmp_path / "net.safetensors", "single_file")
    refuses(lambda: load_mmdit(tmp_path / "net.safetensors", device="meta", loras=[Lora(file)]), *words)


def test_an_adapter_of_a_deeper_model_and_one_that_makes_nan_of_weights_are_refused(tmp_path):
    save_file(factors(key=KEY.replace("0", "7")), tmp_path / "a.safetensors")
    refuses(lambda: change_all(model(), [Lora(tmp_path / "a.safetensors")]), "joint_blocks.7", "3 blocks")
    for bad in (torch.nan, torch.inf):                              # in one row
        change = factors()
        change[f"{KEY}.lora_B.weight"][3, 0] = bad
        save_file(change, tmp_path / "a.safetensors")
        refuses(lambda: change_all(model(), [Lora(tmp_path / "a.safetensors")]), "a.safetensors", "NaN")


# ------------------------------------------------------------------------------------------------------- DPO

def pair(B=2):
    x = inputs(B)
    g = torch.Generator().manual_seed(7)
    better, worse, noise = (torch.randn(x["x"].shape, generator=g) for _ in range(3))
    return better, worse, {"t": x["t"], "noise": noise, "context": x["context"], "pooled": x["pooled"]}


def test_before_it_has_learned_the_loss_is_log_2_for_any_pair():
    better, worse, given_ = pair()
    loss = dpo_loss(add_lora(model(), 2), better, worse, beta=500.0, **given_)
    assert loss.shape == (2,) and torch.allclose(loss, torch.full((2,), math.log(2)), atol=1e-4)


@given(beta=st.floats(0.01, 50))
def test_the_loss_is_that_of_the_formula(beta):
    better, worse, given_ = pair()
    net = learned(model(), seed=5)
    gains = [flow.loss(model(), x, **given_) - flow.loss(net, x, **given_) for x in (better, worse)]
    expected = -(beta * (gains[0] - gains[1])).sigmoid().log()
    assert torch.allclose(dpo_loss(net, better, worse, beta=beta, **given_), expected, rtol=1e-3, atol=1e-3)


def test_it_learns_to_prefer_and_exchanged_pictures_teach_the_opposite():
    better, worse, given_ = pair()
    for first, second in ((better, worse), (worse, better)):
        net = add_lora(model(), 4)
        learning = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss = dpo_loss(net, first, second, beta=5.0, **given_).mean()
            loss.backward()
            optimizer.step()
        gains = [flow.loss(model(), x, **given_) - flow.loss(net, x, **given_) for x in (better, worse)]
        assert loss < 0.6 and ((gains[0] - gains[1]).mean() > 0) == (first is better)
        now = net.state_dict()
        assert all(torch.equal(t, now[name]) for name, t in model().state_dict().items())


def test_of_two_adapters_none_is_applied_if_one_does_not_fit(tmp_path):
    net = model()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    save_file(factors(), tmp_path / "fits.safetensors")
    save_file(factors(key=KEY.replace("0", "7")), tmp_path / "a.safetensors")
    refuses(lambda: change_all(net, [Lora(tmp_path / f"{name}.safetensors") for name in ("fits", "a")]),
            "joint_blocks.7")
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_adapters_are_not_given_twice_and_none_are_not_saved(tmp_path):
    net = add_lora(model(), 2)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(net, 2)
    save_lora(net, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(ValueError, match="no adapters to save"):
        save_lora(merge_lora(net), tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_alpha_is_the_rank_and_the_first_factor_keeps_the_size_of_its_input():
    net = add_lora(MMDiT(MMDiTConfig.preset("tiny", depth=2)), 8)
    for layer in adapters(net).values():
        assert layer.alpha == 8 and abs(layer.lora_A.std() * layer.in_features ** 0.5 - 1) < 0.1


def test_a_seed_decides_how_adapters_begin():
    begun = [[layer.lora_A for layer in adapters(add_lora(model(), 2, seed=s)).values()] for s in (1, 1, 2)]
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(*begun))
