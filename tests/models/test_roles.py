"""What a tensor is for: by rule for families that no table names, by table where a name or a shape hides it."""

from __future__ import annotations

import pytest

from tensorsurgeon.errors import NoMatchError, PlanError, RecipeError, SpecError
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.families import family_names, family_of, read_family
from tensorsurgeon.models.floats import unquantized_linears
from tensorsurgeon.models.mtp import head_expressions, head_paths
from tensorsurgeon.models.roles import Role
from tensorsurgeon.models.selecting import selected, selected_linears, why_left
from tests.families.skeletons import EXPERTS, HIDDEN, INNER, VOCABULARY, attention, ends, gated, numbered, specs_of

LAYER = "model.layers.0"

# Router by its full name, and what makes it one: a name, or one row per expert beside experts.
ROUTERS = {
    "mlp.gate.weight": "mlp.experts",
    "mlp.router.gate.weight": "mlp.experts",
    "mlp.gate.wg.weight": "mlp.experts",
    "mixer.gate.weight": "mixer.experts",
    "router.proj.weight": "experts",
    "feed_forward.gate.weight": "feed_forward.experts",
    "block_sparse_moe.gate.weight": "block_sparse_moe.experts",
    "mlp.router.classifier.weight": "mlp.experts",
    "moe.gate.weight": "moe.experts",
}


@pytest.mark.parametrize(("router", "experts"), ROUTERS.items())
def test_routers_are_told_from_linears_under_any_name(router, experts):
    specs = specs_of(
        {**ends(), **attention(f"{LAYER}.self_attn"), **numbered(f"{LAYER}.{experts}"), f"{LAYER}.{router}": (EXPERTS, HIDDEN)}
    )
    model = describe_model(specs)
    assert model.role(f"{LAYER}.{router}") is Role.ROUTER
    assert f"{LAYER}.{router}" not in selected_linears(specs, ["role:linear"])
    assert model.role(f"{LAYER}.{experts}.0.gate_proj.weight") is Role.EXPERT


def test_a_matrix_with_as_many_rows_as_experts_is_no_router_elsewhere():
    specs = specs_of({**numbered(f"{LAYER}.mlp.experts"), f"{LAYER}.self_attn.g_proj.weight": (EXPERTS, HIDDEN)})
    assert describe_model(specs).role(f"{LAYER}.self_attn.g_proj.weight") is Role.ATTENTION


@pytest.mark.parametrize("name", ["%s", "weight", "a b", "tab\tname", "схема.权重", "..", "a.b.weight", "model.layers.-1.x"])
def test_a_matrix_outside_the_layers_that_no_stream_passes_stays_whatever_it_is_called(name):
    specs = specs_of({**ends(), **attention(f"{LAYER}.self_attn"), name: (3, 2)})
    assert describe_model(specs).role(name) is Role.OTHER
    assert name not in selected_linears(specs, ["role:linear"])
    # One that reads or writes what layers pass on may be a linear, and nobody says whether it is to be quantized.
    with pytest.raises(PlanError, match="what this matrix is for is not known"):
        selected_linears(specs_of({**ends(), **attention(f"{LAYER}.self_attn"), name: (3, HIDDEN)}), ["role:linear"])


@pytest.mark.parametrize("head", ["mtp.layers.0", "model.layers.1", "model.mtp.layers.0", "model.mtp_block.layers.0"])
def test_a_head_for_multi_token_prediction_is_found_wherever_it_lies(head):
    inside = {
        **attention(f"{head}.self_attn"),
        f"{head}.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
        f"{head}.embed_tokens.weight": (VOCABULARY, HIDDEN),
    }
    specs = specs_of({**ends(), **attention(f"{LAYER}.self_attn"), **inside})
    model = describe_model(specs)
    assert {model.role(name) for name in inside} == {Role.MTP}
    assert model.use(f"{head}.self_attn.q_proj.weight").within is Role.ATTENTION
    assert model.use(f"{head}.embed_tokens.weight").kind is Role.EMBEDDING
    assert selected_linears(specs, ["role:linear"]) == list(attention(f"{LAYER}.self_attn"))
    assert set(selected_linears(specs, ["role:mtp.linear"])) == set(attention(f"{head}.self_attn"))


@pytest.mark.parametrize(
    ("module", "expression"),
    [
        ("mtp.layers.0.mlp.gate", "^mtp.*"),
        ("model.layers.61.eh_proj", r"^(model\.)?(language_model\.)?(model\.)?layers\.61\..*"),
        ("model.mtp.layers.0.x", r"^(model\.)?(language_model\.)?(model\.)?mtp\..*"),
    ],
)
def test_configs_name_a_head_by_one_expression(module, expression):
    assert head_expressions([module, module]) == [expression]
    assert len(head_paths([module])) == 1


@pytest.mark.parametrize(
    ("tower", "role"),
    [
        ("vision_tower.transformer.layers.0.attention", Role.VISION),
        ("model.visual.blocks.0.attn", Role.VISION),
        ("vision_model.encoder.layers.0.self_attn", Role.VISION),
        ("model.audio_tower.layers.0.self_attn", Role.AUDIO),
        ("model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.self_attn", Role.VISION),
        ("multi_modal_projector", Role.PROJECTOR),
        ("model.visual.merger", Role.PROJECTOR),
    ],
)
def test_towers_and_projectors_are_no_layers_of_the_text_model(tower, role):
    specs = specs_of({**ends(), **attention(f"{LAYER}.self_attn"), f"{tower}.q_proj.weight": (HIDDEN, HIDDEN)})
    assert describe_model(specs).role(f"{tower}.q_proj.weight") is role
    assert selected_linears(specs, ["role:linear"]) == list(attention(f"{LAYER}.self_attn"))
    assert selected_linears(specs, [f"role:{role}"]) == [f"{tower}.q_proj.weight"]


def test_layers_beside_a_language_model_are_a_tower_whatever_they_are_called():
    tower = "model.seer.layers.0.self_attn.q_proj.weight"
    shapes = {**attention("model.language_model.layers.0.self_attn"), tower: (HIDDEN, HIDDEN)}
    assert describe_model(specs_of(shapes, text_config={"num_hidden_layers": 1})).role(tower) is Role.OTHER


def test_the_indexer_the_residuals_and_what_is_no_matrix_stay():
    others = {
        f"{LAYER}.self_attn.indexer.wq_b.weight": (HIDDEN, HIDDEN),
        f"{LAYER}.attn_hyper_connection.input_mix_weight_down.weight": (8, HIDDEN),
        f"{LAYER}.self_attention_res_proj.weight": (1, HIDDEN),
        f"{LAYER}.linear_attn.conv1d.weight": (HIDDEN, 1, 4),
        f"{LAYER}.linear_attn.in_proj_ba.weight": (4, HIDDEN),
        f"{LAYER}.mlp.shared_expert_gate.weight": (1, HIDDEN),
    }
    specs = specs_of({**others, **attention(f"{LAYER}.self_attn")})
    assert set(selected_linears(specs, ["role:linear"], ["role:linear-attention-gate"])) == set(attention(f"{LAYER}.self_attn"))


def test_a_matrix_that_nobody_knows_stops_the_plan_and_says_what_decides_it():
    strange = f"{LAYER}.whatsit.proj_in.weight"
    specs = specs_of({**attention(f"{LAYER}.self_attn"), strange: (HIDDEN, HIDDEN)})
    with pytest.raises(
        PlanError, match=r"whatsit.proj_in.weight BF16\[64, 64\].*'unheard_of'.*\{path\*\}.whatsit.proj_in.weight"
    ):
        selected_linears(specs, ["role:linear"])
    assert strange not in selected_linears(specs, ["role:linear"], ["{path*}.whatsit.proj_in.weight"])
    assert strange in selected_linears(specs, ["role:linear", "{path*}.whatsit.proj_in.weight"])
    # A step that speaks of names only was told what to take.
    assert len(selected_linears(specs, ["{path*}.q_proj.weight"])) == 1


def test_a_role_takes_weights_and_passes_over_what_lies_beside_them():
    shapes = {**attention(f"{LAYER}.self_attn"), f"{LAYER}.self_attn.q_proj.bias": (HIDDEN,)}
    specs = specs_of(shapes)
    assert f"{LAYER}.self_attn.q_proj.bias" in selected(specs, ["role:attention"])
    assert f"{LAYER}.self_attn.q_proj.bias" not in selected_linears(specs, ["role:attention"])


def test_experts_that_quantize_cannot_take_do_not_stay_behind_in_silence():
    specs = specs_of({f"{LAYER}.ffn.experts.mlp.w1": (EXPERTS * INNER, HIDDEN), **attention(f"{LAYER}.attn")})
    with pytest.raises(SpecError, match="experts stored in one tensor"):
        selected_linears(specs, ["role:linear"])


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("role:experts", RecipeError, "'experts' is no role; did you mean 'expert'"),
        ("role:attention.norm", RecipeError, "have roles within them"),
        ("role:audio", NoMatchError, "no tensor has the role of 'role:audio'"),
        ("role:", RecipeError, "is empty"),
    ],
)
def test_a_role_that_is_none(pattern, error, message):
    with pytest.raises(error, match=message):
        selected(specs_of({**ends(), **attention(f"{LAYER}.self_attn")}), [pattern])


def test_experts_where_there_are_any_and_else_every_linear():
    dense = specs_of({**ends(), **attention(f"{LAYER}.self_attn"), **gated(f"{LAYER}.mlp")})
    sparse = specs_of({**attention(f"{LAYER}.self_attn"), **numbered(f"{LAYER}.mlp.experts")})
    assert len(selected_linears(dense, ["role:expert-else-linear"])) == 7
    assert len(selected_linears(sparse, ["role:expert-else-linear"])) == 3 * EXPERTS
    reason = why_left(sparse, f"{LAYER}.self_attn.q_proj.weight", ["role:expert-else-linear"], [])
    assert reason == "attention, outside role:expert-else-linear"


def test_linears_that_an_engine_builds_without_a_config_are_left_and_the_reason_names_it():
    mamba = {f"{LAYER}.mamba.{x}.weight": (HIDDEN, HIDDEN) for x in ("in_proj", "out_proj")}
    specs = specs_of({**mamba, **gated(f"{LAYER}.feed_forward")}, "jamba")
    assert set(selected_linears(specs, ["role:linear"])) == set(gated(f"{LAYER}.feed_forward"))
    assert "without a quantization config" in why_left(specs, f"{LAYER}.mamba.in_proj.weight", ["role:linear"], [])
    assert set(selected_linears(specs, ["role:linear-attention"])) == set(mamba)


def test_what_is_fused_with_an_indexer_stays_with_it():
    at = "model.language_model.layers.0.self_attn"
    indexer = {f"{at}.indexer.index_qk_proj.weight": (INNER, HIDDEN)}
    specs = specs_of({**attention(at), **indexer}, "qwen4_exp")
    assert selected_linears(specs, ["role:linear"]) == [f"{at}.o_proj.weight"]
    assert len(selected_linears(specs_of(attention(at), "qwen4_exp"), ["role:linear"])) == 4


def test_a_weight_that_its_family_stores_transposed_is_refused_by_name():
    specs = specs_of({"h.0.attn.c_attn.weight": (HIDDEN, 3 * HIDDEN), "h.0.mlp.c_fc.weight": (HIDDEN, 4 * HIDDEN)}, "gpt2")
    with pytest.raises(SpecError, match=r"h.0.attn.c_attn.weight .* stores it \[in, out\] \(table of gpt2\)"):
        selected_linears(specs, ["role:linear"])


@pytest.mark.parametrize(
    ("model_type", "name", "role"),
    [
        ("nemotron_h", "backbone.layers.0.mixer.in_proj.weight", Role.LINEAR_ATTENTION),
        ("nemotron_h", "backbone.layers.0.mixer.q_proj.weight", Role.ATTENTION),
        ("nemotron_h", "backbone.layers.0.mixer.up_proj.weight", Role.MLP),
        ("zamba2", "model.layers.0.linear.weight", Role.RESIDUAL),
        ("step3p5", "model.layers.0.share_expert.up_proj.weight", Role.SHARED_EXPERT),
        ("opt", "model.decoder.layers.0.fc1.weight", Role.MLP),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", Role.ATTENTION),
        ("falcon", "transformer.h.0.mlp.dense_h_to_4h.weight", Role.MLP),
        ("phi4mm", "model.layers.0.self_attn.qkv_proj.lora_A.vision.weight", Role.ADAPTER),
        ("internvl_chat", "mlp1.1.weight", Role.PROJECTOR),
        ("minimax_m3", "language_model.model.layers.0.self_attn.index_q_proj.weight", Role.INDEXER),
        ("mistral", "output.weight", Role.HEAD),
        ("mistral", "tok_embeddings.weight", Role.EMBEDDING),
        ("gemma3n", "model.language_model.layers.0.altup.modality_router.weight", Role.RESIDUAL),
    ],
)
def test_names_of_many_families_have_their_roles(model_type, name, role):
    assert describe_model(specs_of({name: (HIDDEN, HIDDEN)}, model_type)).role(name) is role


def test_every_data_file_is_read_and_found_by_what_it_says_it_is_for():
    assert family_names()
    for name in family_names():
        found = family_of({"model_type": name})
        assert found is None or found.name == name or name in found.model_types
    for kind in ("gpt_oss", "llama4_text", "granitemoehybrid"):
        family = family_of({"text_config": {"model_type": kind}})
        assert family is not None
        assert kind in family.model_types
        assert family.experts
    assert family_of({"architectures": ["DbrxForCausalLM"]}).name == "dbrx"
    assert family_of({"model_type": "unheard_of"}) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("evidence: read\nrolls: {}\n", "unknown keys"), ("model_types: [x]\n", "evidence is missing"),
     ("evidence: read\nexperts: [{tensor: a, parts: [b], axes: [in, in]}]\n", "axes of a")],
)  # fmt: skip
def test_a_data_file_with_a_fault_is_named(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_family(path)


def test_a_linear_called_after_the_embedding_that_it_projects_is_kept_out_of_the_config():
    name = "model.embed_vision.embedding_projection"
    specs = specs_of({**ends(), **attention(f"{LAYER}.self_attn"), f"{name}.weight": (HIDDEN, INNER)})
    assert describe_model(specs).role(f"{name}.weight") is Role.PROJECTOR
    assert name in unquantized_linears(specs, {})


def test_decays_of_a_state_space_are_no_linears_and_hyper_connections_stay():
    specs = specs_of({
        **ends(), f"{LAYER}.mixer.A_log": (HIDDEN, 16), f"{LAYER}.mixer.in_proj.weight": (HIDDEN, HIDDEN),
        f"{LAYER}.attn_hc.fn": (4, HIDDEN), "hc_head_fn": (4, HIDDEN),
    })  # fmt: skip
    model = describe_model(specs)
    assert model.role(f"{LAYER}.mixer.A_log") is Role.LINEAR_ATTENTION
    assert selected_linears(specs, ["role:linear"]) == [f"{LAYER}.mixer.in_proj.weight"]
    assert {model.role(f"{LAYER}.attn_hc.fn"), model.role("hc_head_fn")} == {Role.RESIDUAL}


def test_a_model_whose_linears_no_engine_quantizes_is_refused_with_the_reason():
    specs = specs_of(
        {"backbone.layers.0.mixer.A_log": (HIDDEN, 16), "backbone.layers.0.mixer.in_proj.weight": (HIDDEN, HIDDEN)},
        "mamba",
        architectures=["MambaForCausalLM"],
    )
    with pytest.raises(NoMatchError, match=r"mixer\.in_proj\.weight: vllm .* builds it without a quantization config \(asked\)"):
        selected_linears(specs, ["role:linear"])
    assert selected_linears(specs, ["{path*}.mixer.in_proj.weight"]) == ["backbone.layers.0.mixer.in_proj.weight"]


@pytest.mark.parametrize("odd", [5, 1.5, True, "LlamaForCausalLM", {"a": 1}, [5, None, ["x"]], None])
def test_architectures_of_any_kind_are_no_reason_to_stop(odd):
    specs = specs_of({**ends(), **attention(f"{LAYER}.self_attn")})
    specs.config = {**specs.config, "architectures": odd}
    assert describe_model(specs).role(f"{LAYER}.self_attn.q_proj.weight") is Role.ATTENTION
    assert describe_model(specs).known_by
