// Runs the fused operations on threads of its own under ThreadSanitizer, which sees nothing of torch's pool and OpenMP
// since these were not built with it. `make sanitize` builds and runs this. The exit status is 0 where one thread and
// four give the same bits.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "fused.h"

using namespace covgrpo;

namespace {

struct Threads {
  int count;

  template <class F>
  void operator()(int64_t tasks, const F& f) const {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> pool;
    for (int t = 0; t < count; ++t)
      pool.emplace_back([&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(i);
      });
    for (auto& thread : pool) thread.join();
  }
};

std::mt19937 generator(0);

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> values(count);
  for (float& x : values) x = draw(generator);
  return values;
}

template <class Format>
std::vector<typename Format::Element> rounded(const std::vector<float>& values) {
  std::vector<typename Format::Element> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    if constexpr (Format::PER_UNIT == 2)
      result[i] = static_cast<uint16_t>(bits >> 16);
    else
      result[i] = values[i];
  }
  return result;
}

template <class Format>
std::vector<float> results(int threads) {
  generator.seed(0);
  constexpr int64_t N = 301, D = 77, V = 2 * VOCAB_BLOCK + 133;
  const auto hidden = rounded<Format>(normal(N * D)), weight = rounded<Format>(normal(V * D));
  const auto bias = normal(V), g = normal(N), e = normal(N);
  std::vector<float> temperature(N, 1.3F);
  std::vector<int64_t> targets(N);
  for (auto& y : targets) y = generator() % V;
  const Slice<Format> slice{{hidden.data(), N, D, D, 1},
                            {weight.data(), V, D, D, 1},
                            targets.data(),
                            0,
                            LogitTransform<float>(1.5, 20.0),
                            bias.data(),
                            temperature.data()};
  std::vector<float> maximum(N, NO_MAX), sum(N), entropy_sum(N), target(N);
  std::vector<char> storage(ForwardWorkspace(N, V, slice.hidden.units()).bytes + 64);
  const auto aligned = [](std::vector<char>& s) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(s.data()) + 63) / 64 * 64);
  };
  const Threads parallel{threads};
  constexpr int64_t ROOM = 16;  // less than a row needs
  std::vector<float> min_logits(N, 12.0F), logits(N * ROOM), floors(N, -INFINITY);
  std::vector<int32_t> found(N), vocab_ids(N * ROOM);
  const ForwardOutput forward{{maximum.data(), sum.data(), entropy_sum.data(), target.data()},
                              true,
                              {min_logits.data(), found.data(), vocab_ids.data(), logits.data(), floors.data(), ROOM}};
  fused_forward(slice, forward, parallel, aligned(storage), false);

  std::vector<float> log_sum(N), dh(N * D), db(V);
  for (int64_t i = 0; i < N; ++i) log_sum[i] = std::log1p(sum[i]);
  std::vector<typename Format::Element> dw(V * D);
  std::vector<char> more(BackwardWorkspace(N, V, D, Format::PER_UNIT, true, true, true).bytes + 64);
  BackwardArguments<Format> backward{};
  backward.coefficients = {maximum.data(), log_sum.data(), g.data(), g.data(), entropy_sum.data(), e.data()};
  backward.tails = {min_logits.data(), g.data(), 0.5F};
  backward.hidden = dh.data();
  backward.weight = dw.data();
  backward.weight_scale = 2.0F;
  backward.bias = db.data();
  fused_backward(slice, backward, parallel, aligned(more), false);

  std::vector<float> all;
  for (const auto* part : {&maximum, &sum, &entropy_sum, &target, &dh, &db})
    all.insert(all.end(), part->begin(), part->end());
  // The order of a row's candidates depends on the threads; the largest of them, half of the room, do not.
  for (int64_t i = 0; i < N; ++i) {
    std::sort(&logits[i * ROOM], &logits[i * ROOM] + found[i], std::greater<float>());
    for (int64_t k = 0; k < std::min<int64_t>(found[i], ROOM / 2); ++k) all.push_back(logits[i * ROOM + k]);
  }
  for (const auto x : dw) all.push_back(static_cast<float>(x));
  return all;
}

}  // namespace

int main() {
  if (chosen_isa() != Isa::avx512bf16) {
    std::puts("skipped: needs AVX512-BF16");
    return 0;
  }
  const bool same = results<BFloat16>(1) == results<BFloat16>(4) && results<Float32>(1) == results<Float32>(4);
  std::puts(same ? "the same bits with one thread and with four" : "bits depend on the number of threads");
  return same ? 0 : 1;
}
