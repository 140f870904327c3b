"""What jax-mps, the Metal backend that runs on MLX, can run: read in the source of version 0.10.11
(tillahoffmann/jax-mps at 9cc6ce6, src/pjrt_plugin/ops and type_utils.cc)."""

_OPERATIONS = """
    abs add after_all all_reduce and atan2 bitcast_convert broadcast_in_dim case cbrt ceil
    cholesky clamp compare complex composite concatenate constant convert convolution cosine
    count_leading_zeros create_token custom_call divide dot_general dynamic_slice
    dynamic_update_slice exponential exponential_minus_one fft floor gather imag iota is_finite
    log log_plus_one logistic maximum minimum multiply negate not optimization_barrier or pad
    partition_id popcnt power real reduce reduce_precision reduce_window remainder reshape
    return reverse rng_bit_generator round_nearest_afz round_nearest_even rsqrt scatter select
    select_and_scatter shift_left shift_right_arithmetic shift_right_logical sign sine slice
    sort sqrt subtract tan tanh transpose triangular_solve while xor
"""
OPERATIONS = set(_OPERATIONS.split())
TYPES = {
    "i1",
    *(f"{sign}{bits}" for sign in ("i", "ui") for bits in (8, 16, 32, 64)),
    "f16",
    "bf16",
    "f32",
}
