// Elements looked up at once, and codebooks that registers do not hold, looked up in memory. Included within `simd`, after its
// vectors, `widen` and `gather`.

struct Found {
    Floats part[sizeof(Bytes) / width];
};

struct Gathered {
    const float* points;

    explicit Gathered(const float* table) : points(table) {}
    Found operator()(Bytes codes) const {
        alignas(64) uint8_t index[sizeof(Bytes)];
        std::memcpy(index, &codes, sizeof index);
        Found found;
        for (int i = 0; i < int(sizeof(Bytes)) / width; ++i) found.part[i] = gather(points, widen(index + i * width));
        return found;
    }
};
