"""The model of the examples: a tiny Llama of random weights, and, marked slow, SmolLM2 itself."""

import json
import pathlib

import generate
import gguf_model
import jax
import jax.numpy as jnp
import llama
import numpy as np
import perplexity
import pytest
import serve
import smollm2
import texts

import jaxkv

pytestmark = pytest.mark.slow

TINY = llama.LlamaConfig(
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, rope_base=1e4, norm_eps=1e-5
)
WIDTH, HIDDEN, VOCABULARY, LENGTH = 32, 48, 97, 40
PRECISION = jaxkv.Precision
EXACT = jaxkv.KvCacheConfig(
    64, PRECISION.FP32, PRECISION.FP32, 64, TINY.num_kv_heads, TINY.head_dim
)
Q8 = jaxkv.KvCacheConfig(8, PRECISION.FP16, PRECISION.Q8, 64, TINY.num_kv_heads, TINY.head_dim)

# Ids that llama.cpp gives for the same text and file.
TOKENIZED = {
    "The year 2026 cost 3.14 dollars.": [
        504,
        713,
        216,
        34,
        32,
        34,
        38,
        1708,
        216,
        35,
        30,
        33,
        36,
        8358,
        30,
    ],
    "def f(x):\n    return x**2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198],
    "naïve café — 日本語 🙂": [
        3546,
        46494,
        37366,
        1841,
        17097,
        241,
        115,
        40993,
        179,
        120,
        248,
        47526,
    ],
    "  two  spaces\t\n\n": [216, 827, 216, 5600, 197, 1116],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}


@pytest.fixture
def params(rng: np.random.Generator) -> llama.Params:
    return random_params(rng, VOCABULARY)


@pytest.fixture
def tiny_smollm2(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """The examples' programs with the tiny model and SmolLM2's tokenizer; CI runs them with the
    real one."""
    real = gguf_model.load()
    tiny = real._replace(config=TINY, params=random_params(rng, real.tokenizer.get_vocab_size()))
    monkeypatch.setattr(gguf_model, "load", lambda path=None: tiny)


def random_params(rng: np.random.Generator, vocabulary: int) -> llama.Params:
    query, kv = TINY.num_heads * TINY.head_dim, TINY.num_kv_heads * TINY.head_dim
    matrices = {
        "query": (query, WIDTH),
        "key": (kv, WIDTH),
        "value": (kv, WIDTH),
        "output": (WIDTH, query),
        "gate": (HIDDEN, WIDTH),
        "up": (HIDDEN, WIDTH),
        "down": (WIDTH, HIDDEN),
    }

    def matrix(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape, scale=shape[-1] ** -0.5), jnp.float32)

    def norm() -> jax.Array:
        return jnp.asarray(rng.uniform(0.5, 1.5, WIDTH), jnp.float32)

    def layer() -> llama.Layer:
        drawn = {name: matrix(shape) for name, shape in matrices.items()}
        return llama.Layer(**drawn, attention_norm=norm(), ffn_norm=norm())

    layers = tuple(layer() for _ in range(TINY.num_layers))
    return llama.Params(matrix((vocabulary, WIDTH)), layers, norm())


@pytest.fixture
def tokens(rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.integers(VOCABULARY, size=(2, LENGTH)), jnp.int32)


def empty(config: jaxkv.KvCacheConfig = EXACT, batch_size: int = 2) -> jaxkv.CacheState:
    return jaxkv.init(config, batch_size, num_layers=TINY.num_layers)


def test_rotate_turns_pairs_by_their_angle(rng: np.random.Generator) -> None:
    """Written as complex numbers: (x0 + i x1) exp(i angle)."""
    x = rng.normal(size=(1, 5, 2, 16)).astype(np.float32)
    positions = np.array([[0, 1, 7, 100, 2000]])
    rotated = np.asarray(
        llama.rotate(jnp.asarray(x), llama.rotary_angles(TINY, jnp.asarray(positions)))
    )
    angles = positions[..., None, None] * 1e4 ** (-np.arange(8) / 8)
    expected = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    np.testing.assert_allclose(rotated[..., ::2] + 1j * rotated[..., 1::2], expected, atol=5e-4)
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])


def test_a_token_does_not_see_later_ones(params: llama.Params, tokens: jax.Array) -> None:
    _, hidden = llama.forward(TINY, params, None, tokens, llama.uncached)
    _, changed = llama.forward(TINY, params, None, tokens.at[:, 20].add(1), llama.uncached)
    np.testing.assert_array_equal(hidden[:, :20], changed[:, :20])
    assert np.abs(hidden[:, 20:] - changed[:, 20:]).max(axis=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [17, 1, 1, 13, 8]])
def test_an_exact_cache_changes_nothing(
    params: llama.Params, tokens: jax.Array, chunks: list[int]
) -> None:
    _, expected = llama.forward(TINY, params, None, tokens, llama.uncached)
    forward = jax.jit(llama.forward, static_argnums=(0, 4))
    for attention in (llama.cached, llama.prefilled):
        state, outputs = empty(), []
        for chunk in jnp.split(tokens, np.cumsum(chunks[:-1]), axis=1):
            state, hidden = forward(TINY, params, state, chunk, attention)
            outputs.append(hidden)
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, atol=2e-5)
        np.testing.assert_array_equal(state.end, LENGTH)


def test_a_scan_over_layers_is_the_unrolled_model(params: llama.Params, tokens: jax.Array) -> None:
    forward = jax.jit(llama.forward, static_argnums=0)
    state, hidden = forward(TINY, params, empty(Q8), tokens)
    scanned_state, scanned = forward(TINY, llama.stack_layers(params), empty(Q8), tokens)
    np.testing.assert_allclose(scanned, hidden, atol=2e-5)
    assert jax.tree.structure(state) == jax.tree.structure(scanned_state)


def test_greedy_decoding_takes_the_likeliest(params: llama.Params, tokens: jax.Array) -> None:
    """In one loop or in two, and as the model without a cache says."""
    greedy, key = jnp.float32(0), jax.random.key(0)
    state, logits = llama.prefill(TINY, params, empty(), tokens[:, :10])
    first = llama.sample(key, logits, greedy)
    state, one = llama.decode(TINY, params, state, first, key, greedy, length=8)
    state, two = llama.decode(TINY, params, state, one[:, -1], key, greedy, length=8)
    decoded = jnp.concatenate([first[:, None], one, two], axis=1)
    assert_greedy(TINY, params, tokens[:, :10], decoded)


def test_sampling_follows_temperature_and_key() -> None:
    scores = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    keys = jax.random.split(jax.random.key(1), 2000)
    for temperature in (0.5, 1.0):
        drawn = jax.vmap(llama.sample, (0, None, None))(keys, scores, jnp.float32(temperature))[
            :, 0
        ]
        expected = jnp.array([0.1, 0.6, 0.3]) ** (1 / temperature)
        np.testing.assert_allclose(np.bincount(drawn) / 2000, expected / expected.sum(), atol=0.04)
    assert llama.sample(keys[0], scores, jnp.float32(0)).tolist() == [1]


def test_evaluate_finds_no_loss_in_an_exact_cache(params: llama.Params, tokens: jax.Array) -> None:
    windows = np.asarray(jnp.tile(tokens[:, :32], (8, 1)))
    baseline = perplexity.read_windows(TINY, params, EXACT, windows, chunk=32, batch_size=16)
    exact = perplexity.evaluate(TINY, params, EXACT, windows, baseline, chunk=6, batch_size=16)
    assert exact["tokens"] == 256
    assert exact["top1"] == 1
    assert exact["kl"] == pytest.approx(0, abs=1e-6)
    assert exact["perplexity"] == pytest.approx(exact["baseline_perplexity"], rel=1e-5)
    quantized = perplexity.evaluate(TINY, params, Q8, windows, baseline, chunk=8, batch_size=16)
    assert 1e-7 < quantized["kl"] < 1e-3
    assert quantized["baseline_perplexity"] == exact["baseline_perplexity"]


def test_perplexity_of_a_uniform_model(params: llama.Params, tokens: jax.Array) -> None:
    uniform = params._replace(norm=jnp.zeros(WIDTH))
    windows = np.asarray(jnp.tile(tokens[:, :32], (8, 1)))
    result = perplexity.evaluate(TINY, uniform, EXACT, windows, chunk=32, batch_size=16)
    assert result["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ("--store fp32", 32),
        ("--store fp16", 16),
        ("--store q8", 8.5),
        ("--store q4", 4.5),
        ("--store q4 --keys 4,32,rotate --values 4,64,rotate,symmetric", 4.625),
        ("--store q4 --keys 2,32,channel --values 4,64 --migration batched --sinks 64", 3.75),
    ],
)
def test_options_describe_the_cache(options: str, bits: float) -> None:
    args = perplexity.parse_options(options.split())
    model = llama.LlamaConfig(30, 9, 3, 64, 1e5, 1e-5)
    config = generate.cache_config(args, model, 2048)
    assert config.max_tokens == 2048
    assert perplexity.bits_per_element(config) == pytest.approx(bits)


def test_bad_options_say_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    for options in (["--tokens", "0"], ["--keys", "4,64,rotated"], ["--values", "x"]):
        with pytest.raises(SystemExit):
            generate.parse_options(options)
        assert options[0] in capsys.readouterr().err
    with pytest.raises(ValueError, match="lower --tokens"):
        perplexity.cut_windows([0] * 1000, 1024, 2048)
    with pytest.raises(ValueError, match="prose"):
        texts.read_text("poetry")
    monkeypatch.setenv("JAXKV_CACHE", str(tmp_path))
    (tmp_path / smollm2.FILE_NAME).write_bytes(b"half a download")
    with pytest.raises(ValueError, match="delete the file"):
        smollm2.fetch()


def assert_greedy(
    model: llama.LlamaConfig, params: llama.Params, prompt: jax.Array, decoded: jax.Array
) -> None:
    """Each token of `decoded` [B, T] is the likeliest after `prompt` and those before it, without a
    cache.

    By induction over the tokens, `decoded` then is what greedy decoding without a cache gives.
    """
    sequence = jnp.concatenate([prompt, decoded], axis=1)
    _, hidden = llama.forward(model, params, None, sequence, llama.uncached)
    likeliest = jnp.argmax(llama.logits(params, hidden), axis=-1)
    np.testing.assert_array_equal(decoded, likeliest[:, prompt.shape[1] - 1 : -1])


@pytest.mark.slow
def test_smollm2_through_an_exact_cache_is_smollm2() -> None:
    loaded = gguf_model.load()
    model, params = loaded.config, loaded.stacked
    text = loaded.chat.format(prompt="Explain in a few sentences how the tides come about.")
    prompt = jnp.asarray([loaded.encode(text)], jnp.int32)
    config = jaxkv.KvCacheConfig(
        128, PRECISION.FP32, PRECISION.FP32, 128, model.num_kv_heads, model.head_dim
    )
    state = jaxkv.init(config, num_layers=model.num_layers)
    state, logits = llama.prefill(model, params, state, prompt)
    greedy, key = jnp.float32(0), jax.random.key(0)
    first = llama.sample(key, logits, greedy)
    state, following = llama.decode(model, params, state, first, key, greedy, length=63)
    assert_greedy(model, params, prompt, jnp.concatenate([first[:, None], following], axis=1))


@pytest.mark.slow
def test_tokenizer_agrees_with_llama_cpp_and_loses_nothing() -> None:
    tokenizer = gguf_model.load().tokenizer
    for text, ids in TOKENIZED.items():
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for name in texts.TEXTS:
        text = texts.read_text(name)
        ids = tokenizer.encode(text).ids
        assert len(ids) >= 50_000
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_smollm2")
def test_generate_streams_text_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--quick", "--temperature", "0.7", "--seed", "3"])
    out = capsys.readouterr().out
    for row in ("tokens/s", "share of a step", "bytes of the cache", "the same in fp16"):
        assert row in out


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_smollm2")
def test_perplexity_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    perplexity.main(["--quick", "--json", "--tail", "32"])
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 512
    assert result["bits_per_element"] == perplexity.bits_per_element(
        jaxkv.KvCacheConfig(32, num_kv_heads=2, head_dim=16)
    )
    assert result["perplexity"] == pytest.approx(result["baseline_perplexity"], rel=0.05)
    assert 0 < result["kl"] < 0.05
    assert 0.5 < result["top1"] <= 1


@pytest.mark.usefixtures("tiny_smollm2")
def test_serve_gives_each_request_what_it_gets_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Prefixes are found, requests are parked and come back, drafts are rewound: the tokens are
    those of each request alone (the program asserts it)."""
    serve.main(["--quick", "--store", "q8"])
    *_, last, firsts, same = capsys.readouterr().out.splitlines()
    hits, swaps = (int(x) for x in last.split()[-2:])
    assert hits > 0 and swaps > 0
    assert firsts.startswith("seconds to the first token") and "compiled 1 + 1 times" in same
