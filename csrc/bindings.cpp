// The operators of covgrpo_kernels/kernels/cpp.py, which says what they take and do. They are built on libtorch's
// stable ABI: one binary serves every torch from 2.11 on.
//
// The package checks a user's arguments. Checked here are the shapes, dtypes and devices that would otherwise be a read
// or write out of bounds.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "covariance_weights.h"
#include "fused.h"
#include "tiles.h"

namespace covgrpo::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("covgrpo_kernels, C++: ") + what);
}

// ------------------------------------------------------------------------------------------ tensors as pointers

template <class T>
constexpr ScalarType type_of();
template <>
constexpr ScalarType type_of<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType type_of<double>() {
  return ScalarType::Double;
}
template <>
constexpr ScalarType type_of<int64_t>() {
  return ScalarType::Long;
}
template <>
constexpr ScalarType type_of<int32_t>() {
  return ScalarType::Int;
}
template <>
constexpr ScalarType type_of<bool>() {
  return ScalarType::Bool;
}

template <class T>
void check_type(const Tensor& t) {
  check(t.is_cpu() && t.scalar_type() == type_of<T>(), "a tensor has another dtype or device");
}

// The elements of a contiguous tensor that has `count` of them.
template <class T>
T* data(const Tensor& t, int64_t count) {
  check_type<T>(t);
  check(t.numel() == count && t.is_contiguous(), "a tensor has another size, or is not contiguous");
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const OptionalTensor& t, int64_t count) {
  return t ? data<T>(*t, count) : nullptr;
}

// A tensor [count, R] of numbers per row, one kind after the other. It may be a view of some rows of a larger one: the
// numbers of a kind are contiguous, and the kinds are any distance apart.
template <class T>
class Packed {
 public:
  Packed(const Tensor& t, int64_t rows) {
    check_type<T>(t);
    check(t.dim() == 2 && t.size(1) == rows && (rows <= 1 || t.stride(1) == 1),
          "a tensor has another size, or rows that are not contiguous");
    data_ = static_cast<T*>(t.data_ptr());
    stride_ = rows > 0 ? t.stride(0) : 0;  // without rows there is no memory to point into
    count_ = t.size(0);
  }

  int64_t count() const { return count_; }
  T* operator[](int64_t kind) const { return data_ + kind * stride_; }

 private:
  T* data_;
  int64_t stride_, count_;
};

template <class T>
OnlineSoftmaxRows<T> online_softmax_of(const Tensor& t, int64_t rows) {
  const Packed<T> packed(t, rows);
  check(packed.count() == 4, "a running softmax is four numbers per row");
  return {packed[0], packed[1], packed[2], packed[3]};
}

template <class T>
CoefficientRows<T> coefficients_of(const Tensor& t, int64_t rows) {
  const Packed<T> packed(t, rows);
  const bool has_entropy = packed.count() == 6;
  check(packed.count() == 4 || has_entropy, "coefficients are four or six numbers per row");
  return {
      packed[0], packed[1], packed[2], packed[3], has_entropy ? packed[4] : nullptr, has_entropy ? packed[5] : nullptr};
}

// Of R rows: min_logits, found, vocab_ids, logits, floors; or nothing.
template <class T>
Candidates<T> candidates_of(const std::vector<Tensor>& t, int64_t rows) {
  if (t.empty()) return {};
  check(t.size() == 5, "candidates are five tensors");
  const int64_t room = t[2].size(1);
  check(room <= Candidates<T>::MAX_ROOM, "there is room for too many candidates");
  return {data<T>(t[0], rows),        data<int32_t>(t[1], rows), data<int32_t>(t[2], rows * room),
          data<T>(t[3], rows * room), data<T>(t[4], rows),       room};
}

// f(T()) for the dtype T of a tensor, float or double. Any other is taken for float, which `data` then refuses.
template <class F>
void by_dtype(const Tensor& t, const F& f) {
  t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

// ------------------------------------------------------------------------------------------------------ threads

// f(i) for every task i, each on the next free thread of torch's pool. No result depends on which thread that is.
template <class F>
void parallel(int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = smaller<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(i);
  });
}

// f(begin, end) for ranges of rows that have 16,384 elements together or, where a row has more, for single rows. So
// many exponentials take some ten microseconds, beside which the fetching of a task costs nothing.
template <class F>
void parallel_rows(int64_t rows, int64_t columns, const F& f) {
  const int64_t at_once = larger<int64_t>(1, (1 << 14) / larger<int64_t>(1, columns));
  parallel((rows + at_once - 1) / at_once, [&](int64_t i) { f(i * at_once, smaller(rows, (i + 1) * at_once)); });
}

// --------------------------------------------------------------------------------------------- operations on a tile

template <class T>
Tile<T> tile_of(const Tensor& products, const Tensor& targets, int64_t first, double scale,
                std::optional<double> softcap, const OptionalTensor& bias, const OptionalTensor& temperature) {
  const int64_t rows = products.size(0), columns = products.size(1);
  return {data<T>(products, rows * columns), columns,
          data<int64_t>(targets, rows),      first,
          LogitTransform<T>(scale, softcap), data<T>(bias, columns),
          data<T>(temperature, rows)};
}

void online_softmax_(const Tensor& products, const Tensor& running, const Tensor& targets, int64_t first, double scale,
                     std::optional<double> softcap, const OptionalTensor& bias, const OptionalTensor& temperature,
                     bool entropy, const std::vector<Tensor>& collecting) {
  by_dtype(products, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = products.size(0);
    const OnlineSoftmaxTile<T> tile{tile_of<T>(products, targets, first, scale, softcap, bias, temperature),
                                    online_softmax_of<T>(running, rows), entropy, candidates_of<T>(collecting, rows)};
    auto* range = by_isa(chosen_isa(), online_softmax_baseline<T>, online_softmax_avx2<T>, online_softmax_avx512<T>);
    parallel_rows(rows, tile.columns, [&](int64_t begin, int64_t end) { range(tile, begin, end); });
  });
}

void dlogits(const Tensor& products, const Tensor& targets, int64_t first, double scale, std::optional<double> softcap,
             const OptionalTensor& bias, const OptionalTensor& temperature, const Tensor& coefficients) {
  by_dtype(products, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = products.size(0);
    const DlogitsTile<T> tile{tile_of<T>(products, targets, first, scale, softcap, bias, temperature),
                              coefficients_of<T>(coefficients, rows)};
    auto* range = by_isa(chosen_isa(), dlogits_baseline<T>, dlogits_avx2<T>, dlogits_avx512<T>);
    parallel_rows(rows, tile.columns, [&](int64_t begin, int64_t end) { range(tile, begin, end); });
  });
}

// ------------------------------------------------------------------------------------------- covariance weights

Segments segments_of(const std::vector<Tensor>& tensors, int64_t tokens) {
  check(tensors.size() >= 2, "segments are two or three tensors");
  const int64_t bound = tensors[1].numel() - 1;
  return {data<int64_t>(tensors[0], tokens), data<int64_t>(tensors[1], bound + 1),
          tensors.size() > 2 ? data<int64_t>(tensors[2], tokens) : nullptr, bound};
}

void covariance_weights(const Tensor& logprobs, const Tensor& advantages, const Tensor& valid,
                        const std::vector<Tensor>& scopes, const std::vector<Tensor>& sequences, bool by_sequence,
                        bool by_response, bool numel, double bandwidth_eps, const Tensor& weights,
                        const Tensor& covariance, const Tensor& deviation, const Tensor& std) {
  by_dtype(logprobs, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = logprobs.numel();
    const Tokens<T> tokens{data<T>(logprobs, n), data<T>(advantages, n), data<bool>(valid, n)};
    const Segments scope = segments_of(scopes, n);
    Weighting how{nullptr, nullptr, nullptr, numel, bandwidth_eps};
    std::vector<double> lengths, means;
    if (by_sequence || by_response) {
      const Segments sequence = segments_of(sequences, n);
      lengths.resize(sequence.bound), means.resize(sequence.bound);
      parallel(sequence.bound, [&](int64_t s) { sequence_mean(tokens, sequence, s, lengths.data(), means.data()); });
      how.sequence = sequence.segment;
      if (by_response) how.lengths = lengths.data();
      if (by_sequence) how.means = means.data();
    }
    const CovarianceStats out{data<double>(weights, n), data<double>(covariance, n), data<double>(deviation, n),
                              data<double>(std, scope.bound)};
    parallel(scope.bound, [&](int64_t i) { weigh_scope(tokens, scope, how, i, out); });
  });
}

// ------------------------------------------------------------------------------------------------ sparse product

float number(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
T number(T x) {
  return x;
}

// out[i] = sum of values[k] * matrix[indices[k]] over the k of output row i, from left to right.
template <class T, class Element>
void sparse_product_typed(const Tensor& values, const Tensor& indices, const Tensor& offsets, const Tensor& matrix,
                          const Tensor& out) {
  const int64_t count = values.numel(), out_rows = out.size(0), depth = out.size(1);
  const T* value = data<T>(values, count);
  const int64_t *index = data<int64_t>(indices, count), *offset = data<int64_t>(offsets, out_rows + 1);
  T* sums = data<T>(out, out_rows * depth);
  const auto* rows = static_cast<const Element*>(matrix.data_ptr());
  const int64_t row_stride = matrix.stride(0), stride = matrix.stride(1);
  parallel_rows(out_rows, depth, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* sum = sums + i * depth;
      std::fill(sum, sum + depth, T(0));
      for (int64_t k = offset[i]; k < offset[i + 1]; ++k) {
        const Element* row = rows + index[k] * row_stride;
        for (int64_t j = 0; j < depth; ++j) sum[j] += value[k] * number(row[j * stride]);
      }
    }
  });
}

void sparse_product(const Tensor& values, const Tensor& indices, const Tensor& offsets, const Tensor& matrix,
                    const Tensor& out) {
  check(matrix.size(1) == out.size(1), "the matrix has another depth");
  switch (matrix.scalar_type()) {
    case ScalarType::BFloat16:
      return sparse_product_typed<float, uint16_t>(values, indices, offsets, matrix, out);
    case ScalarType::Float:
      return sparse_product_typed<float, float>(values, indices, offsets, matrix, out);
    case ScalarType::Double:
      return sparse_product_typed<double, double>(values, indices, offsets, matrix, out);
    default:
      check(false, "the matrix has a dtype that has no sparse product");
  }
}

// ------------------------------------------------------------------------------ matrix products with the softmax

#if COVGRPO_X86

char* bytes_of(const Tensor& workspace, int64_t needed) {
  check(workspace.is_cpu() && workspace.scalar_type() == ScalarType::Byte && workspace.numel() >= needed,
        "the workspace is too small");
  return static_cast<char*>(workspace.data_ptr());
}

// f(Format()) for the format of the operands.
template <class F>
void by_format(const Tensor& hidden, const F& f) {
  check(chosen_isa() == Isa::avx512bf16, "fused products need AVX512-BF16");
  if (hidden.scalar_type() == ScalarType::Float) return f(Float32{});
  check(hidden.scalar_type() == ScalarType::BFloat16, "fused products are of bfloat16 or float32");
  f(BFloat16{});
}

template <class Format>
Matrix<Format> matrix_of(const Tensor& t) {
  return {static_cast<const typename Format::Element*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// The elements of a contiguous tensor that has the dtype and the size of another.
template <class Format>
typename Format::Element* elements(const OptionalTensor& t, const Tensor& like) {
  if (!t) return nullptr;
  check(t->scalar_type() == like.scalar_type() && t->numel() == like.numel() && t->is_contiguous(),
        "a gradient has another dtype or size, or is not contiguous");
  return static_cast<typename Format::Element*>(t->data_ptr());
}

template <class Format>
Slice<Format> slice_of(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t first, double scale,
                       std::optional<double> softcap, const OptionalTensor& bias, const OptionalTensor& temperature) {
  const int64_t tokens = hidden.size(0), vocab = weight.size(0);
  check(hidden.scalar_type() == weight.scalar_type() && hidden.size(1) == weight.size(1),
        "hidden and weight don't match");
  return {matrix_of<Format>(hidden),
          matrix_of<Format>(weight),
          data<int64_t>(targets, tokens),
          first,
          LogitTransform<float>(scale, softcap),
          data<float>(bias, vocab),
          data<float>(temperature, tokens)};
}

constexpr auto IN_PARALLEL = [](int64_t tasks, const auto& f) { parallel(tasks, f); };

void fused_forward(const Tensor& hidden, const Tensor& weight, const Tensor& running, const Tensor& targets,
                   int64_t first, double scale, std::optional<double> softcap, const OptionalTensor& bias,
                   const OptionalTensor& temperature, bool entropy, const std::vector<Tensor>& collecting,
                   const Tensor& workspace, bool keep_packed) {
  by_format(hidden, [&](auto format) {
    using Format = decltype(format);
    const int64_t tokens = hidden.size(0);
    const ForwardOutput out{online_softmax_of<float>(running, tokens), entropy,
                            candidates_of<float>(collecting, tokens)};
    const auto slice = slice_of<Format>(hidden, weight, targets, first, scale, softcap, bias, temperature);
    const ForwardWorkspace needed(tokens, weight.size(0), slice.hidden.units());
    covgrpo::fused_forward(slice, out, IN_PARALLEL, bytes_of(workspace, needed.bytes), keep_packed);
  });
}

// min_logits and bias_counts; or nothing.
Tails tails_of(const std::vector<Tensor>& tails, double scale, int64_t tokens) {
  if (tails.empty()) return {};
  check(tails.size() == 2, "tails are two tensors");
  check(tokens >= 2 * LANES, "sixteen tails need sixteen rows that they are the tails of");
  return {data<float>(tails[0], LANES), data<float>(tails[1], LANES), static_cast<float>(scale)};
}

void fused_backward(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t first, double scale,
                    std::optional<double> softcap, const OptionalTensor& bias, const OptionalTensor& temperature,
                    const Tensor& coefficients, const OptionalTensor& hidden_sum, bool add_to_hidden,
                    const OptionalTensor& weight_sum, bool add_to_weight, const OptionalTensor& weight_grad,
                    double weight_scale, const OptionalTensor& bias_sum, const std::vector<Tensor>& tails,
                    double tail_scale, const OptionalTensor& addend, const OptionalTensor& addend_rows,
                    const Tensor& workspace, bool keep_packed) {
  by_format(hidden, [&](auto format) {
    using Format = decltype(format);
    const int64_t tokens = hidden.size(0), depth = hidden.size(1), vocab = weight.size(0);
    check(!add_to_weight || weight_sum.has_value(), "there is no sum to add to");
    check(!addend_rows.has_value() || addend.has_value(), "there is no addend");
    const BackwardArguments<Format> g{coefficients_of<float>(coefficients, tokens),
                                      tails_of(tails, tail_scale, tokens),
                                      data<float>(hidden_sum, tokens * depth),
                                      add_to_hidden,
                                      data<float>(weight_sum, vocab * depth),
                                      add_to_weight,
                                      elements<Format>(weight_grad, weight),
                                      static_cast<float>(weight_scale),
                                      addend ? data<float>(*addend, addend->size(0) * depth) : nullptr,
                                      data<int32_t>(addend_rows, vocab),
                                      data<float>(bias_sum, vocab)};
    const auto slice = slice_of<Format>(hidden, weight, targets, first, scale, softcap, bias, temperature);
    const BackwardWorkspace needed(tokens, vocab, depth, Format::PER_UNIT, g.hidden, g.weight || g.weight_sum, g.bias);
    covgrpo::fused_backward(slice, g, IN_PARALLEL, bytes_of(workspace, needed.bytes), keep_packed);
  });
}

int64_t fused_forward_bytes(int64_t rows, int64_t vocab, int64_t depth, int64_t itemsize) {
  return ForwardWorkspace(rows, vocab, ceil_div(depth * itemsize, 4)).bytes;
}

int64_t fused_backward_bytes(int64_t rows, int64_t vocab, int64_t depth, int64_t itemsize, bool needs_hidden,
                             bool needs_weight, bool needs_bias) {
  return BackwardWorkspace(rows, vocab, depth, 4 / itemsize, needs_hidden, needs_weight, needs_bias).bytes;
}

#endif

}  // namespace
}  // namespace covgrpo::ops

STABLE_TORCH_LIBRARY(covgrpo_cpp, m) {
  m.def(
      "online_softmax_(Tensor products, Tensor(a!) running, Tensor targets, int first, float scale, float? softcap, "
      "Tensor? bias, Tensor? temperature, bool entropy, Tensor[] collecting) -> ()");
  m.def(
      "dlogits(Tensor(a!) products, Tensor targets, int first, float scale, float? softcap, Tensor? bias, "
      "Tensor? temperature, Tensor coefficients) -> ()");
  m.def(
      "covariance_weights(Tensor logprobs, Tensor advantages, Tensor valid, Tensor[] scopes, Tensor[] sequences, "
      "bool by_sequence, bool by_response, bool numel, float bandwidth_eps, Tensor(a!) weights, "
      "Tensor(b!) covariance, Tensor(c!) deviation, Tensor(d!) std) -> ()");
  m.def("sparse_product(Tensor values, Tensor indices, Tensor offsets, Tensor matrix, Tensor(a!) out) -> ()");
  m.def(
      "fused_forward(Tensor hidden, Tensor weight, Tensor(a!) running, Tensor targets, int first, float scale, "
      "float? softcap, Tensor? bias, Tensor? temperature, bool entropy, Tensor[] collecting, Tensor(b!) workspace, "
      "bool keep_packed) -> ()");
  m.def(
      "fused_backward(Tensor hidden, Tensor weight, Tensor targets, int first, float scale, float? softcap, "
      "Tensor? bias, Tensor? temperature, Tensor coefficients, Tensor(a!)? hidden_sum, bool add_to_hidden, "
      "Tensor(b!)? weight_sum, bool add_to_weight, Tensor(c!)? weight_grad, float weight_scale, "
      "Tensor(d!)? bias_sum, Tensor[] tails, float tail_scale, Tensor? addend, Tensor? addend_rows, "
      "Tensor(e!) workspace, bool keep_packed) -> ()");
  m.def("fused_forward_bytes(int rows, int vocab, int depth, int itemsize) -> int");
  m.def(
      "fused_backward_bytes(int rows, int vocab, int depth, int itemsize, bool needs_hidden, bool needs_weight, "
      "bool needs_bias) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(covgrpo_cpp, CPU, m) {
  m.impl("online_softmax_", TORCH_BOX(&covgrpo::ops::online_softmax_));
  m.impl("dlogits", TORCH_BOX(&covgrpo::ops::dlogits));
  m.impl("covariance_weights", TORCH_BOX(&covgrpo::ops::covariance_weights));
  m.impl("sparse_product", TORCH_BOX(&covgrpo::ops::sparse_product));
#if COVGRPO_X86
  m.impl("fused_forward", TORCH_BOX(&covgrpo::ops::fused_forward));
  m.impl("fused_backward", TORCH_BOX(&covgrpo::ops::fused_backward));
#endif
}

#if COVGRPO_X86
STABLE_TORCH_LIBRARY_IMPL(covgrpo_cpp, CompositeExplicitAutograd, m) {
  m.impl("fused_forward_bytes", TORCH_BOX(&covgrpo::ops::fused_forward_bytes));
  m.impl("fused_backward_bytes", TORCH_BOX(&covgrpo::ops::fused_backward_bytes));
}
#endif

// The instruction set in use. Raises ValueError where COVGRPO_CPU_ISA names none, RuntimeError where the processor
// lacks the one that it names.
static PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(covgrpo::ISA_NAMES[static_cast<int>(covgrpo::chosen_isa())]);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

static PyMethodDef methods[] = {{"isa", isa, METH_NOARGS, "The instruction set in use."},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cpp", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__cpp() { return PyModule_Create(&definition); }
