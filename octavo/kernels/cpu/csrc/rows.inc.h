/* What works on rows of numbers one by one: norm, rotation, gated activation, argmax. */

/* `size`, a multiple of LANES, numbers as another type. */
static void narrow(const float *x, int32_t type, int64_t size, uint8_t *to) {
    for (int64_t i = 0; i < size; i += LANES)
        if (type == FLOAT16)
            store_number(FLOAT16, to + 2 * i, load(x + i));
        else
            store_number(BFLOAT16, to + 2 * i, load(x + i));
}

static void rms_norm(const float *x, float *residual, const float *weight, float *out, int64_t size,
                     float eps, int32_t add_one) {
    vf squares = {};
    float tail_squares = 0;
    int64_t whole = size / LANES * LANES;
    const float *from = x;
    if (residual) {
        for (int64_t i = 0; i < whole; i += LANES)
            store(residual + i, load(x + i) + load(residual + i));
        for (int64_t i = whole; i < size; i++) residual[i] += x[i];
        from = residual;
    }
    for (int64_t i = 0; i < whole; i += LANES) squares = vfma(load(from + i), load(from + i), squares);
    for (int64_t i = whole; i < size; i++) tail_squares += from[i] * from[i];
    float factor = 1.0f / sqrtf((sum_lanes(squares) + tail_squares) / (float)size + eps);
    float one = add_one ? 1.0f : 0.0f;
    for (int64_t i = 0; i < whole; i += LANES)
        store(out + i, load(from + i) * splat(factor) * (load(weight + i) + splat(one)));
    for (int64_t i = whole; i < size; i++) out[i] = from[i] * factor * (weight[i] + one);
}

static void rotate(float *x, const float *cos, const float *sin, int64_t rot_dim) {
    int64_t half = rot_dim / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf a = load(x + i), b = load(x + half + i);
        store(x + i, a * load(cos + i) + b * load(sin + i));
        store(x + half + i, b * load(cos + half + i) + a * load(sin + half + i));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cos[i] + b * sin[i];
        x[half + i] = b * cos[half + i] + a * sin[half + i];
    }
}

INLINE vf activate(vf x, int32_t act) {
    if (act == ACT_SILU) return x / (splat(1.0f) + vexp(-x));
    if (act == ACT_GELU_TANH) {
        vf inner = splat(0.79788456f) * vfma(splat(0.044715f) * x * x, x, x);
        return splat(0.5f) * x * (splat(1.0f) + vtanh(inner));
    }
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < LANES; i++) lanes[i] *= 0.5f * (1.0f + erff(lanes[i] * 0.70710678f));
    return load(lanes);
}

static void gate(const float *g, const float *up, float *out, int64_t size, int32_t act) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        store(out + i, activate(load(g + i), act) * load(up + i));
    if (i < size) {
        float a[LANES] = {0}, b[LANES] = {0};
        memcpy(a, g + i, (size_t)(size - i) * sizeof(float));
        memcpy(b, up + i, (size_t)(size - i) * sizeof(float));
        vf value = activate(load(a), act) * load(b);
        memcpy(out + i, &value, (size_t)(size - i) * sizeof(float));
    }
}

/* As torch has it: the first of equals, and of numbers that are none the first. */
static int64_t argmax(const float *x, int64_t size) {
    float best = -INFINITY;
    int64_t at = 0;
    for (int64_t start = 0; start < size; start += 1024) {
        int64_t stop = start + 1024 < size ? start + 1024 : size, i = start;
        vf most = splat(-INFINITY);
        vi none = {};
        for (; i + LANES <= stop; i += LANES) {
            vf v = load(x + i);
            most = vmax(v, most);
            none |= v != v;
        }
        float top = max_lanes(most);
        int32_t odd = 0;
        for (int l = 0; l < LANES; l++) odd |= none[l];
        for (; i < stop; i++) {
            if (x[i] > top) top = x[i];
            odd |= x[i] != x[i];
        }
        if (odd)
            for (i = start; i < stop; i++)
                if (x[i] != x[i]) return i;
        if (top <= best) continue;
        best = top;
        for (at = start; x[at] != top; at++) {
        }
    }
    return at;
}
