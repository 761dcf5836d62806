// Codebooks that registers do not hold, looked up in memory. Included within `simd`, after its vectors and `gather`.

struct Gathered {
    const float* points;
    float scale = 1.0f, zero = 0.0f;

    explicit Gathered(const float* table) : points(table) {}
    Floats operator()(Ints codes) const { return gather(points, codes) * scale + zero; }
    Gathered stretched(float by, float to) const {
        Gathered result = *this;
        result.scale = by, result.zero = to;
        return result;
    }
};
