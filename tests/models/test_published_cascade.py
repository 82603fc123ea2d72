"""StableCascade's stages: diffusers' folders and the original's files give models that compute what diffusers' do."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from encoders import save_encoder

from models import checkpoint as checkpoints
from models.convert import main as convert
from models.data.text import TextEncoder
from models.denoisers.cascade_config import SIZES
from models.runtime.plain import as_plain
from models.sample import main as sample
from models.sampling.predictor import Predictor
from models.weights.layout import Hints, check_fit
from models.weights.layouts import LAYOUTS

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

CAPTIONS = ["a red square", "blue"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoders"), "clip-projection")


def randomized(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
    return model.eval()


def stage_c():
    return randomized(
        diffusers.models.StableCascadeUNet(
            in_channels=4, out_channels=4, conditioning_dim=24, block_out_channels=(16, 32), num_attention_heads=(2, 4),
            down_num_layers_per_block=(1, 2), up_num_layers_per_block=(2, 1), clip_text_in_channels=16,
            clip_text_pooled_in_channels=16, clip_image_in_channels=10, switch_level=(False,),
        )
    )  # fmt: skip


def stage_b(effnet=6):
    return randomized(
        diffusers.models.StableCascadeUNet(
            in_channels=4, out_channels=4, patch_size=2, conditioning_dim=24, block_out_channels=(8, 16, 32),
            num_attention_heads=(0, 2, 4), down_num_layers_per_block=(1, 2, 1), up_num_layers_per_block=(1, 2, 1),
            down_blocks_repeat_mappers=(1, 1, 1), up_blocks_repeat_mappers=(2, 3, 1),
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                *((("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2),
            ),
            clip_text_pooled_in_channels=16, effnet_in_channels=effnet, pixel_mapper_in_channels=3,
            dropout=(0.0, 0.1, 0.1), timestep_conditioning_type=("sca",), switch_level=None,
        )
    )  # fmt: skip


def vqgan():
    module = sys.modules[diffusers.WuerstchenDecoderPipeline.__module__]  # its place depends on the version
    sizes = {"embed_dim": 16, "bottleneck_blocks": 2, "num_vq_embeddings": 32, "scale_factor": 0.5}
    return randomized(module.PaellaVQModel(**sizes))


def original_names(weights, stage):
    """As StableCascade's code names them: q, k and v in one, as torch's MultiheadAttention has them."""
    found = {}
    for name, value in weights.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            value = torch.cat([weights[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"])
            name = name.replace(".to_q.", ".attn.in_proj_")
        name = name.replace(".to_out.0.", ".attn.out_proj.")
        found[name.replace("clip_txt_pooled_mapper", "clip_mapper") if stage == "b" else name] = value
    return found


def clip_states(encoder):
    """Of the captions and of no words, as the pipelines of diffusers have them: pooled, and all states."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.CLIPTextModelWithProjection.from_pretrained(encoder).eval()
    tokens = tokenizer([*CAPTIONS, ""], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = model(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
    assert not torch.allclose(output.hidden_states[-1], output.last_hidden_state)
    return output.text_embeds[:, None], output.hidden_states[-1]


def assert_goes_back(kind, run, weights, names=()):
    file = run.parent / f"back-{len(names)}.safetensors"
    convert([kind, str(run), "--to", str(file), *names])
    back = safetensors.load_file(file)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("form", ["diffusers", "original"])
@pytest.mark.parametrize("stage", ["c", "b"])
def test_a_converted_stage_is_diffusers(stage, form, encoder, tmp_path):
    theirs, kind = stage_c() if stage == "c" else stage_b(), f"cascade-{stage}"
    weights, source = original_names(theirs.state_dict(), stage), tmp_path / "w.safetensors"
    if form == "diffusers":
        source = tmp_path / "unet"
        theirs.save_pretrained(source)
    else:
        safetensors.save_file(weights, source)
    size = (6, 10) if stage == "c" else (8, 16)
    options = ["--heads", "4", "--size", *map(str, size), "--text-encoder", encoder]
    convert([kind, str(source), *options, "--out", str(tmp_path / "run")])
    checkpoint = checkpoints.latest(tmp_path / "run")[1]
    model = checkpoint.build().eval()
    y = TextEncoder(encoder, max_length=77, cascade=True)(CAPTIONS)
    x, r = torch.randn(2, 4, *size), torch.tensor([0.3, 0.3])
    pooled, states = clip_states(encoder)
    low = torch.randn(2, 6, 3, 2)
    with torch.no_grad():
        cond, null = Predictor(model, y, 4.0, conditions={} if stage == "c" else {"low": low})(x, 1000 * r[0])
        for got, rows, share in ((cond, [0, 1], 1.0), (null, [2, 2], 0.0)):
            told = {"clip_text": states[rows], "clip_img": torch.zeros(2, 1, 10)} if stage == "c" else {}
            told |= {"effnet": share * low} if stage == "b" else {}
            expected = theirs(x, r, clip_text_pooled=pooled[rows], **told).sample
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        if stage == "c":  # a picture beside the caption
            image = torch.randn(2, 2, 10)
            expected = theirs(x, r, pooled[:2], states[:2], image).sample
            torch.testing.assert_close(model(x, 1000 * r, y, image=image), expected, rtol=1e-4, atol=1e-4)
    objective = checkpoint.train["objective"]
    assert (objective["sample_shift"], objective["noise"]) == ((2.0, "white") if stage == "c" else (1.0, "pyramid"))
    assert_goes_back(kind, tmp_path / "run", weights)
    assert_goes_back(kind, tmp_path / "run", theirs.state_dict(), ["--names", "diffusers"])
    with pytest.raises(SystemExit, match="adapters of a StableCascade have no published layers"):
        convert([kind, str(tmp_path / "run"), "--adapters", str(tmp_path / "adapters")])


@pytest.mark.slow
@pytest.mark.parametrize("size", ["c-1b", "b-700m"])
def test_the_published_sizes_are_told_by_their_shapes(size):
    """Of the smaller ones, without memory: the settings, and every name and shape there and back."""
    known, stage = SIZES[size], size[0]
    types = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}
    options = {
        "conditioning_dim": known["condition_width"],
        "block_out_channels": known["widths"],
        "num_attention_heads": known["heads"],
        "down_num_layers_per_block": known["down"],
        "up_num_layers_per_block": known["up"],
        "up_blocks_repeat_mappers": known["repeats"],
        "down_blocks_repeat_mappers": (1,) * len(known["widths"]),
        "block_types_per_layer": tuple(tuple(types[letter] for letter in letters) for letters in known["levels"]),
        "clip_text_pooled_in_channels": 1280,
        "dropout": known["dropout"],
    }
    if stage == "c":
        options |= {"clip_text_in_channels": 1280, "clip_image_in_channels": 768, "switch_level": (False,)}
    else:
        options |= {"in_channels": 4, "out_channels": 4, "patch_size": 2, "effnet_in_channels": 16}
        options |= {"pixel_mapper_in_channels": 3, "timestep_conditioning_type": ("sca",)}
    with torch.device("meta"):
        theirs = diffusers.models.StableCascadeUNet(**options).state_dict()
        hints = Hints(empty=lambda **_: torch.empty(78, 1280))
        converted = LAYOUTS[f"cascade-{stage}"].read(dict(theirs), hints)
    check_fit(converted.config, converted.weights)
    assert {name: getattr(converted.config, name) for name in known} == known
    saved = checkpoints.Checkpoint({}, as_plain(converted.config), [], 0, {}, converted.weights, {}, {})
    layout = LAYOUTS[f"cascade-{stage}"]
    back = layout.to_diffusers(layout.write(saved))
    assert {name: value.shape for name, value in back.items()} == {name: v.shape for name, v in theirs.items()}


def test_a_converted_stage_a_is_diffusers(tmp_path):
    theirs = vqgan()
    with torch.no_grad():
        theirs.down_blocks[3][1].running_mean.normal_()
        theirs.down_blocks[3][1].running_var.uniform_(0.5, 2)
    theirs.save_pretrained(tmp_path / "vqgan")
    convert(["cascade-a", str(tmp_path / "vqgan"), "--out", str(tmp_path / "run")])
    model = checkpoints.latest(tmp_path / "run")[1].build().eval()
    x = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        latents = theirs.encode(x).latents
        torch.testing.assert_close(model.encode(2 * x - 1), latents / 0.5, rtol=1e-4, atol=1e-4)
        clip = model.encode(2 * x[:, :, None] - 1)
        torch.testing.assert_close(clip[:, :, 0], latents / 0.5, rtol=1e-4, atol=1e-4)
        pixels = (model.decode(latents / 0.5) + 1) / 2
        torch.testing.assert_close(pixels, theirs.decode(latents).sample, rtol=1e-4, atol=1e-4)
    codes = {"vquantizer.embedding.weight": "vquantizer.codebook.weight"}
    weights = {codes.get(name, name): value for name, value in theirs.state_dict().items()}
    assert_goes_back("cascade-a", tmp_path / "run", weights)
    assert_goes_back("cascade-a", tmp_path / "run", theirs.state_dict(), ["--names", "diffusers"])
    safetensors.save_file(weights, tmp_path / "original.safetensors")
    convert(["cascade-a", str(tmp_path / "original.safetensors"), "--out", str(tmp_path / "again")])
    assert checkpoints.latest(tmp_path / "again")[1].config["scale"] == 0.43


def test_from_a_prompt_to_a_picture(encoder, tmp_path):
    a, b, c = (str(tmp_path / stage) for stage in "abc")
    vqgan().save_pretrained(tmp_path / "vqgan")
    unet = stage_c()
    with torch.no_grad():
        unet.clf[1].weight *= 0.01
    unet.save_pretrained(tmp_path / "prior")
    unet = stage_b(effnet=4)
    with torch.no_grad():
        unet.clf[1].weight *= 0.01
    unet.save_pretrained(tmp_path / "decoder")
    convert(["cascade-a", str(tmp_path / "vqgan"), "--out", a])
    told = ["--heads", "4", "--text-encoder", encoder]
    convert(["cascade-b", str(tmp_path / "decoder"), *told, "--size", "8", "16", "--autoencoder", a, "--out", b])
    convert(["cascade-c", str(tmp_path / "prior"), *told, "--size", "3", "5", "--out", c])
    with pytest.raises(SystemExit, match="names no autoencoder; convert it with one, or use --latents"):
        sample([c, "--prompt", "blue", "--steps", "1"])
    options = ["--prompt", "blue", "a red square", "--count", "2", "--steps", "2", "--guidance", "4"]
    sample([c, *options, "--latents"])
    assert [file.name for file in (tmp_path / "c" / "samples").iterdir() if file.suffix != ".lock"] == ["samples.npz"]
    small = tmp_path / "c" / "samples" / "samples.npz"
    with np.load(small) as arrays:
        assert arrays["clips"].shape == (2, 1, 3, 5, 4) and arrays["clips"].dtype == np.float32
        assert arrays["clips"].std() > 0.1
    sample([b, "--low", str(small), "--steps", "2", "--guidance", "1.1", "--out", str(tmp_path / "pictures")])
    with np.load(tmp_path / "pictures" / "samples.npz") as arrays:
        assert arrays["clips"].shape == (2, 1, 32, 64, 3) and arrays["labels"].tolist() == ["blue", "a red square"]
    sample([b, "--prompt", "blue", "a red square", "--count", "2", "--steps", "2", "--out", str(tmp_path / "without")])
    with np.load(tmp_path / "pictures" / "samples.npz") as ours, np.load(tmp_path / "without" / "samples.npz") as other:
        assert (ours["clips"] != other["clips"]).any()


def test_a_stage_becomes_a_video_model(encoder, tmp_path):
    stage_c().save_pretrained(tmp_path / "prior")
    options = ["--heads", "4", "--size", "6", "10", "--text-encoder", encoder]
    convert(["cascade-c", str(tmp_path / "prior"), *options, "--out", str(tmp_path / "image")])
    convert(["video", str(tmp_path / "image"), "--frames", "3", "--out", str(tmp_path / "video")])
    image, video = (checkpoints.latest(tmp_path / name)[1] for name in ("image", "video"))
    assert video.config["levels"] == ["CTAV", "CTAV"] and video.config["input_size"] == [3, 6, 10]
    y = TextEncoder(encoder, max_length=77, cascade=True)(CAPTIONS)
    x, t = torch.randn(2, 4, 3, 6, 10), torch.tensor([200.0, 900.0])
    with torch.no_grad():
        clip, model = video.build().eval()(x, t, y), image.build().eval()
        for i in range(3):
            torch.testing.assert_close(clip[:, :, i], model(x[:, :, i], t, y), rtol=1e-4, atol=1e-4)
    with pytest.raises(SystemExit, match="only a Cascade for images with null_tokens is StableCascade's"):
        convert(["cascade-c", str(tmp_path / "video"), "--to", str(tmp_path / "back.pt")])
    with pytest.raises(SystemExit, match="attention is 'joint'; a StableCascade has attention over time behind each"):
        other = ["--frames", "3", "--attention", "joint", "--out", str(tmp_path / "other")]
        convert(["video", str(tmp_path / "image"), *other])


def test_a_stage_that_does_not_fit(encoder, tmp_path):
    def refusal(kind, weights, *options):
        safetensors.save_file(weights, tmp_path / "w.safetensors")
        with pytest.raises(SystemExit) as error:
            convert([kind, str(tmp_path / "w.safetensors"), *options, "--heads", "4", "--out", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()
        return str(error.value)

    b, text = stage_b().state_dict(), ["--text-encoder", encoder]
    assert "the file has no tensor 'clip_img_mapper.weight'" in refusal("cascade-c", b, *text)
    assert "text_encoder must be named" in refusal("cascade-b", b)
    name = "down_blocks.1.2.kv_mapper.1.bias"
    assert "missing: down.1.groups.0.A.condition.bias [16]" in refusal(
        "cascade-b", {key: value for key, value in b.items() if key != name}, *text
    )
    assert "unknown: more [1]" in refusal("cascade-b", b | {"more": torch.ones(1)}, *text)
    assert "clf.1.weight has shape [16]; it must have 4 axes" in refusal(
        "cascade-b", b | {"clf.1.weight": torch.ones(16)}, *text
    )
    assert "misshapen: latent_mapper.2.weight [8]" in refusal(
        "cascade-b", b | {"effnet_mapper.2.weight": torch.ones(8)}, *text
    )
    lacks = {key: value for key, value in b.items() if key != "up_blocks.0.2.attention.to_k.weight"}
    assert "must all be there, and have one shape" in refusal("cascade-b", lacks, *text)
    less = {key: value for key, value in b.items() if not key.startswith("down_blocks.1.5.")}
    assert "down_blocks.1 has blocks 'CTACT'; they must be groups that begin with C" in refusal(
        "cascade-b", less, *text
    )
