/* Drawing a row's token, and rating it: nothing is sorted, and what cannot matter is skipped.
 *
 * A logit x has the weight 2^t, where t = (x - highest) * log2(e) / temperature <= 0, and none below
 * 2^floor. A row is seen in strips of STRIP logits: the highest of a strip tells what is in it.
 *
 * Nothing is fused and sums run in ROW lanes whatever a vector's length, so every instruction set
 * draws the same token. */

#define ROW 16

typedef struct {
    const float *x;
    int64_t size, num_strips;
    float highest, scale, floor;
    float *strips, *sums; /* [num_strips]: the highest logit, the sum of weights */
    int64_t num;
    float *t, *weights; /* of tokens or strips that are being looked at; room for all */
} odds;

static odds make_odds(const float *x, int64_t size, float *work) {
    odds o = {.x = x, .size = size, .num_strips = divide_up(size, STRIP)};
    o.strips = work, o.sums = o.strips + o.num_strips;
    o.t = o.sums + o.num_strips, o.weights = o.t + o.num_strips * STRIP;
    return o;
}

/* 2^t; 0 below the floor, which is -126 or more. To 3 ulp, and 1 for 0. */
INLINE vf power(vf t, vf floor) {
    vi some = t >= floor;
    vf held = vmax(t, floor), whole = held + splat(ROUNDING);
    vf f = held - (whole - splat(ROUNDING));
    vf p = splat(1.326472848e-3f) * f + splat(9.671512991e-3f);
    p = p * f + splat(5.550733581e-2f);
    p = p * f + splat(2.402224243e-1f);
    p = p * f + splat(6.931470037e-1f);
    p = p * f + splat(1.0f);
    vi n = (vi)whole - (vi)splat(ROUNDING);
    return (vf)((vi)(p * (vf)((n + 127) << 23)) & some);
}

INLINE vf scaled(const odds *o, const float *p) {
    return (load(p) - splat(o->highest)) * splat(o->scale);
}
INLINE float scaled_one(const odds *o, float x) { return (x - o->highest) * o->scale; }

/* Strip i, the last one filled up with -inf. */
INLINE const float *strip_at(const odds *o, int64_t i, float *last) {
    int64_t num = o->size - i * STRIP;
    if (num >= STRIP) return o->x + i * STRIP;
    memcpy(last, o->x + i * STRIP, (size_t)num * sizeof(float));
    for (; num < STRIP; num++) last[num] = -INFINITY;
    return last;
}

/* Find the highest logits, of each strip and of all; NaN if there is one. */
static void survey(odds *o) {
    float last[STRIP];
    vi none = {};
    o->highest = -INFINITY;
    for (int64_t i = 0; i < o->num_strips; i++) {
        const float *p = strip_at(o, i, last);
        vf most = splat(-INFINITY);
        for (int j = 0; j < STRIP; j += LANES) {
            vf v = load(p + j);
            none |= v != v;
            most = vmax(v, most);
        }
        o->strips[i] = max_lanes(most);
        if (o->strips[i] > o->highest) o->highest = o->strips[i];
    }
    for (int l = 0; l < LANES; l++)
        if (none[l]) o->highest = NAN;
}

static double total(const float *weights, int64_t num) {
    double sum = 0;
    for (int64_t i = 0; i < num; i++) sum += weights[i];
    return sum;
}

/* Add up the weights, of each strip and of all. */
static double weigh(odds *o) {
    float last[STRIP];
    for (int64_t i = 0; i < o->num_strips; i++) {
        o->sums[i] = 0;
        if (!(scaled_one(o, o->strips[i]) >= o->floor)) continue;
        const float *p = strip_at(o, i, last);
        vf sum[ROW / LANES] = {};
        for (int j = 0; j < STRIP; j += ROW)
            for (int v = 0; v < ROW / LANES; v++)
                sum[v] += power(scaled(o, p + j + v * LANES), splat(o->floor));
        for (int h = ROW / LANES / 2; h; h /= 2) /* as sum_lanes goes on: halves onto halves */
            for (int v = 0; v < h; v++) sum[v] += sum[v + h];
        o->sums[i] = sum_lanes(sum[0]);
    }
    return total(o->sums, o->num_strips);
}

/* List the t from `lowest` on, and their weights; returns the sum of these, roughly. */
static float gather(odds *o, float lowest) {
    float last[STRIP], t[STRIP];
    vf sum = {};
    o->num = 0;
    for (int64_t i = 0; i < o->num_strips; i++) {
        if (!(scaled_one(o, o->strips[i]) >= lowest)) continue;
        const float *p = strip_at(o, i, last);
        for (int j = 0; j < STRIP; j += LANES) store(t + j, scaled(o, p + j));
        for (int j = 0; j < STRIP; j++) { /* without a branch, which could not be foreseen */
            o->t[o->num] = t[j];
            o->num += t[j] >= lowest;
        }
    }
    for (int64_t i = o->num; i % LANES; i++) o->t[i] = -INFINITY;
    for (int64_t i = 0; i < o->num; i += LANES) {
        vf weight = power(load(o->t + i), splat(o->floor));
        store(o->weights + i, weight);
        sum += weight;
    }
    return sum_lanes(sum);
}

/* List each strip's highest t with `values`, such as its sum; what is below the floor is left out. */
static void gather_strips(odds *o, const float *values) {
    o->num = 0;
    for (int64_t i = 0; i < o->num_strips; i++) {
        o->t[o->num] = scaled_one(o, o->strips[i]);
        o->weights[o->num] = values[i];
        o->num += o->t[o->num] >= o->floor;
    }
}

/* How unlikely, in steps of 2^-24: tokens of one step are equally likely, as far as float32 goes. */
#define STEPS 16777216.0f
INLINE uint32_t step_of(float t) { return (uint32_t)(t * -STEPS); }

/* The lowest t of a step. Below -1 a step has one at most. */
INLINE float lowest_of(uint32_t step) {
    float at = (float)step / -STEPS;
    return at > -1 ? nextafterf(at - 1 / STEPS, 0) : at;
}

/* The end of the first step such that those listed up to it weigh `needed`, each its weight or 1; -inf
 * if all weigh less. Spoils the list: digit by digit of the step is found, and what has another is
 * dropped. */
static float find_lowest(odds *o, double needed, int by_weight) {
    uint32_t step = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
        const uint32_t most = shift == 20 ? 2047 : 1023;
        double bins[2048] = {0};
        for (int64_t i = 0; i < o->num; i++)
            bins[step_of(o->t[i]) >> shift & most] += by_weight ? o->weights[i] : 1;
        uint32_t digit = 0, next = 0; /* the last one that has any, if rounding lets all be too few */
        for (; next <= most; next++) {
            if (!bins[next]) continue;
            digit = next;
            if (bins[next] >= needed) break;
            needed -= bins[next];
        }
        if (shift == 20 && next > most) return -INFINITY;
        int64_t num = 0;
        for (int64_t i = 0; i < o->num; i++) {
            if ((step_of(o->t[i]) >> shift & most) != digit) continue;
            o->t[num] = o->t[i];
            o->weights[num++] = o->weights[i];
        }
        o->num = num;
        step |= digit << shift;
    }
    return lowest_of(step);
}

/* Keep the `num` most likely: none is below the highest of that many strips. */
static void keep_number(odds *o, int64_t num) {
    gather_strips(o, o->strips);
    gather(o, fmaxf(find_lowest(o, (double)num, 0), o->floor));
    o->floor = fmaxf(find_lowest(o, (double)num, 0), o->floor);
}

/* Keep the most likely that hold so much of the mass. They are sought in the strips that hold still
 * more, not below the highest of any; if that was too high a guess, lower and lower. */
static void keep_mass(odds *o, double needed, double mass) {
    gather_strips(o, o->sums);
    float guess = find_lowest(o, (needed + 3 * mass) / 4, 1), lowest = -INFINITY;
    for (; lowest == -INFINITY && guess > o->floor; guess -= 3)
        if (gather(o, guess) >= needed) lowest = find_lowest(o, needed, 1);
    if (lowest == -INFINITY) {
        gather(o, o->floor);
        lowest = find_lowest(o, needed, 1);
    }
    o->floor = fmaxf(lowest, o->floor);
}

/* Where the running sum passes the target, or failing that by rounding the last that has a weight.
 * Of the target that is left which lies within. */
static int64_t place(const float *weights, int64_t num, double *target) {
    double sum = 0, before = 0;
    int64_t at = 0;
    for (int64_t i = 0; i < num && sum <= *target; i++) {
        if (weights[i] > 0) at = i, before = sum;
        sum += weights[i];
    }
    *target -= before;
    return at;
}

static int64_t place_token(const odds *o, double target) {
    float last[STRIP], weights[STRIP];
    int64_t i = place(o->sums, o->num_strips, &target);
    const float *p = strip_at(o, i, last);
    for (int j = 0; j < STRIP; j += LANES)
        store(weights + j, power(scaled(o, p + j), splat(o->floor)));
    return i * STRIP + place(weights, STRIP, &target);
}

static int64_t draw(const float *x, int64_t size, const choice *c, float *work) {
    if (c->temperature == 0) return argmax(x, size);
    odds o = make_odds(x, size, work);
    survey(&o);
    if (!isfinite(o.highest)) return argmax(x, size);
    o.scale = fmaxf(1.44269504f / fmaxf(c->temperature, 1e-10f), 1e-30f);
    o.floor = c->min_p > 0 ? fminf(fmaxf(log2f(c->min_p), -126), 0) : -126;
    if (c->top_k > 0 && c->top_k < size) keep_number(&o, c->top_k);
    double mass = weigh(&o);
    if (c->top_p < 1) {
        keep_mass(&o, c->top_p * mass, mass);
        mass = weigh(&o);
    }
    return place_token(&o, c->number * mass);
}

/* The `num` highest logits of a row and where they are, highest first, of equal ones the first. */
static void find_highest(const odds *o, int32_t num, float *values, int64_t *ids) {
    int32_t held = 0;
    for (int64_t i = 0; i < o->num_strips; i++) {
        if (held == num && !(o->strips[i] > values[num - 1])) continue;
        int64_t stop = least((i + 1) * STRIP, o->size);
        for (int64_t id = i * STRIP; id < stop; id++) {
            if (held == num && !(o->x[id] > values[num - 1])) continue;
            int32_t at = held < num ? held++ : num - 1;
            for (; at > 0 && o->x[id] > values[at - 1]; at--)
                values[at] = values[at - 1], ids[at] = ids[at - 1];
            values[at] = o->x[id], ids[at] = id;
        }
    }
}

/* ids[0]: a token. Writes the num_top most likely after it, 1 + num_top log-probabilities (NaN if the
 * row has no highest finite logit), and returns the token's rank. */
static int64_t rate(const float *x, int64_t size, int32_t num_top, int64_t *ids, float *logprobs,
                    float *work) {
    odds o = make_odds(x, size, work);
    survey(&o);
    o.scale = 1.44269504f, o.floor = -126;
    double log_mass = isfinite(o.highest) ? log(weigh(&o)) : NAN;
    float chosen = x[ids[0]];
    logprobs[0] = chosen;
    if (num_top) find_highest(&o, num_top, logprobs + 1, ids + 1);
    for (int32_t i = 0; i <= num_top; i++)
        logprobs[i] = (float)((double)logprobs[i] - o.highest - log_mass);
    int64_t rank = 1;
    for (int64_t i = 0; i < o.num_strips; i++) {
        if (!(o.strips[i] > chosen)) continue;
        int64_t stop = least((i + 1) * STRIP, size);
        for (int64_t id = i * STRIP; id < stop; id++) rank += x[id] > chosen;
    }
    return rank;
}
