// The operators of covgrpo_kernels/tiles/cpp.py, on libtorch's stable ABI: one binary serves every torch from 2.11 on.
// Shapes, dtypes and devices are the caller's to get right (covgrpo_kernels/layout.py checks a user's); what is checked
// here would otherwise be a write out of bounds.
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

#include "group_weights.h"
#include "products.h"
#include "tiles.h"

namespace covgrpo {
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

// The entries of a contiguous tensor of `count` of them.
template <class T>
T* data(const Tensor& t, int64_t count) {
  check(t.is_cpu() && t.scalar_type() == type_of<T>(), "a tensor has another dtype or device");
  check(t.numel() == count && t.is_contiguous(), "a tensor has another size, or is not contiguous");
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const OptionalTensor& t, int64_t count) {
  return t ? data<T>(*t, count) : nullptr;
}

// ------------------------------------------------------------------------------------------------------ threads

// f(i) for every task i, each at the next free thread of torch's pool. Which thread that is decides nothing.
template <class F>
void parallel(int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = smaller<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(i);
  });
}

// f(begin, end) for ranges of rows of about 16,000 entries.
template <class F>
void parallel_rows(int64_t rows, int64_t columns, const F& f) {
  const int64_t at_once = larger<int64_t>(1, (1 << 14) / larger<int64_t>(1, columns));
  parallel((rows + at_once - 1) / at_once, [&](int64_t i) { f(i * at_once, smaller(rows, (i + 1) * at_once)); });
}

// ---------------------------------------------------------------------------------------------- tile operations

// Of R rows: threshold, count, entries, logits; or nothing.
template <class T>
Candidates<T> candidates_of(const std::vector<Tensor>& t, int64_t rows) {
  if (t.empty()) return {};
  check(t.size() == 4, "candidates are four tensors");
  const int64_t capacity = t[2].size(1);
  return {data<T>(t[0], rows), data<int32_t>(t[1], rows), data<int32_t>(t[2], rows * capacity),
          data<T>(t[3], rows * capacity), capacity};
}

template <class T>
Tile<T> tile_of(const Tensor& tile, const Tensor& targets, int64_t first, double scale, std::optional<double> softcap,
                const OptionalTensor& bias, const OptionalTensor& temperature) {
  const int64_t rows = tile.size(0), columns = tile.size(1);
  return {data<T>(tile, rows * columns), columns,
          data<int64_t>(targets, rows),  first,
          Head<T>(scale, softcap),       data<T>(bias, columns),
          data<T>(temperature, rows)};
}

template <class T>
void fold_typed(const Tensor& tile, const Tensor& maximum, const Tensor& total, const Tensor& moment,
                const Tensor& target, const Tensor& targets, int64_t first, double scale, std::optional<double> softcap,
                const OptionalTensor& bias, const OptionalTensor& temperature, bool entropy,
                const std::vector<Tensor>& candidates) {
  const int64_t rows = tile.size(0);
  const FoldTile<T> t{tile_of<T>(tile, targets, first, scale, softcap, bias, temperature),
                      data<T>(maximum, rows),
                      data<T>(total, rows),
                      data<T>(moment, rows),
                      data<T>(target, rows),
                      entropy,
                      candidates_of<T>(candidates, rows)};
  auto* fold_range = by_isa(chosen_isa(), fold_baseline<T>, fold_avx2<T>, fold_avx512<T>);
  parallel_rows(rows, t.columns, [&](int64_t begin, int64_t end) { fold_range(t, begin, end); });
}

void fold(const Tensor& tile, const Tensor& maximum, const Tensor& total, const Tensor& moment, const Tensor& target,
          const Tensor& targets, int64_t first, double scale, std::optional<double> softcap, const OptionalTensor& bias,
          const OptionalTensor& temperature, bool entropy, const std::vector<Tensor>& candidates) {
  auto* typed = tile.scalar_type() == ScalarType::Double ? fold_typed<double> : fold_typed<float>;
  typed(tile, maximum, total, moment, target, targets, first, scale, softcap, bias, temperature, entropy, candidates);
}

template <class T>
void grad_typed(const Tensor& tile, const Tensor& targets, int64_t first, double scale, std::optional<double> softcap,
                const OptionalTensor& bias, const OptionalTensor& temperature, const std::vector<Tensor>& per_row,
                const OptionalTensor& entropy_grad) {
  const int64_t rows = tile.size(0);
  check(per_row.size() == 5, "grad takes five coefficients of a row");
  const GradTile<T> t{tile_of<T>(tile, targets, first, scale, softcap, bias, temperature),
                      data<T>(per_row[0], rows),
                      data<T>(per_row[1], rows),
                      data<T>(per_row[2], rows),
                      data<T>(per_row[3], rows),
                      data<T>(per_row[4], rows),
                      data<T>(entropy_grad, rows)};
  auto* grad_range = by_isa(chosen_isa(), grad_baseline<T>, grad_avx2<T>, grad_avx512<T>);
  parallel_rows(rows, t.columns, [&](int64_t begin, int64_t end) { grad_range(t, begin, end); });
}

void grad(const Tensor& tile, const Tensor& targets, int64_t first, double scale, std::optional<double> softcap,
          const OptionalTensor& bias, const OptionalTensor& temperature, const std::vector<Tensor>& per_row,
          const OptionalTensor& entropy_grad) {
  auto* typed = tile.scalar_type() == ScalarType::Double ? grad_typed<double> : grad_typed<float>;
  typed(tile, targets, first, scale, softcap, bias, temperature, per_row, entropy_grad);
}

// ------------------------------------------------------------------------------------------------ group weights

Segments segments_of(const std::vector<Tensor>& tensors, int64_t tokens) {
  const int64_t bound = tensors[1].numel() - 1;
  return {data<int64_t>(tensors[0], tokens), data<int64_t>(tensors[1], bound + 1),
          tensors.size() > 2 ? data<int64_t>(tensors[2], tokens) : nullptr, bound};
}

template <class T>
void group_weights_typed(const Tensor& logprobs, const Tensor& advantages, const Tensor& valid,
                         const std::vector<Tensor>& scope, const std::vector<Tensor>& sequence, bool by_sequence,
                         bool by_response, bool numel, double bandwidth_eps, const Tensor& weights,
                         const Tensor& covariance, const Tensor& deviation, const Tensor& std) {
  const int64_t n = logprobs.numel();
  const covgrpo::Tokens<T> tokens{data<T>(logprobs, n), data<T>(advantages, n), data<bool>(valid, n)};
  const Segments scopes = segments_of(scope, n);
  Weighting how{nullptr, nullptr, nullptr, numel, bandwidth_eps};
  std::vector<double> lengths, means;
  if (by_sequence || by_response) {
    const Segments sequences = segments_of(sequence, n);
    lengths.resize(sequences.bound), means.resize(sequences.bound);
    parallel(sequences.bound, [&](int64_t s) { sequence_mean(tokens, sequences, s, lengths.data(), means.data()); });
    how.sequence = sequences.segment;
    if (by_response) how.lengths = lengths.data();
    if (by_sequence) how.means = means.data();
  }
  const GroupWeights out{data<double>(weights, n), data<double>(covariance, n), data<double>(deviation, n),
                         data<double>(std, scopes.bound)};
  parallel(scopes.bound, [&](int64_t i) { weigh_scope(tokens, scopes, how, i, out); });
}

void group_weights(const Tensor& logprobs, const Tensor& advantages, const Tensor& valid,
                   const std::vector<Tensor>& scope, const std::vector<Tensor>& sequence, bool by_sequence,
                   bool by_response, bool numel, double bandwidth_eps, const Tensor& weights, const Tensor& covariance,
                   const Tensor& deviation, const Tensor& std) {
  auto* typed = logprobs.scalar_type() == ScalarType::Double ? group_weights_typed<double> : group_weights_typed<float>;
  typed(logprobs, advantages, valid, scope, sequence, by_sequence, by_response, numel, bandwidth_eps, weights,
        covariance, deviation, std);
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

// out[i] = sum of values[k] * matrix[indices[k]] over k of segment i, from left to right.
template <class T, class Element>
void sparse_product_typed(const Tensor& values, const Tensor& indices, const Tensor& offsets, const Tensor& matrix,
                          const Tensor& out) {
  const int64_t count = values.numel(), segments = out.size(0), depth = out.size(1);
  const T* value = data<T>(values, count);
  const int64_t *index = data<int64_t>(indices, count), *offset = data<int64_t>(offsets, segments + 1);
  T* sums = data<T>(out, segments * depth);
  const auto* rows = static_cast<const Element*>(matrix.data_ptr());
  const int64_t row_stride = matrix.stride(0), stride = matrix.stride(1);
  parallel_rows(segments, depth, [&](int64_t begin, int64_t end) {
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

// ------------------------------------------------------------------------------------------ products with softmax

#if COVGRPO_X86

char* bytes_of(const Tensor& workspace, int64_t needed) {
  check(workspace.is_cpu() && workspace.scalar_type() == ScalarType::Byte && workspace.numel() >= needed,
        "the workspace is too small");
  return static_cast<char*>(workspace.data_ptr());
}

void need_products() { check(chosen_isa() == Isa::avx512bf16, "fused products need AVX512-BF16"); }

template <class Format>
Matrix<Format> matrix_of(const Tensor& t) {
  return {static_cast<const typename Format::Element*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// Of a contiguous tensor like another one.
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
  const int64_t rows = hidden.size(0), entries = weight.size(0);
  check(hidden.scalar_type() == weight.scalar_type() && hidden.size(1) == weight.size(1),
        "hidden and weight don't match");
  return {matrix_of<Format>(hidden),   matrix_of<Format>(weight),  data<int64_t>(targets, rows),  first,
          Head<float>(scale, softcap), data<float>(bias, entries), data<float>(temperature, rows)};
}

template <class Format>
void fold_products_typed(const Tensor& hidden, const Tensor& weight, const Tensor& maximum, const Tensor& total,
                         const Tensor& moment, const Tensor& target, const Tensor& targets, int64_t first, double scale,
                         std::optional<double> softcap, const OptionalTensor& bias, const OptionalTensor& temperature,
                         bool entropy, const std::vector<Tensor>& candidates, const Tensor& workspace,
                         bool packed_before) {
  const int64_t rows = hidden.size(0);
  const RunningRows out{data<float>(maximum, rows),
                        data<float>(total, rows),
                        data<float>(moment, rows),
                        data<float>(target, rows),
                        entropy,
                        candidates_of<float>(candidates, rows)};
  const auto slice = slice_of<Format>(hidden, weight, targets, first, scale, softcap, bias, temperature);
  const FoldWorkspace needed(rows, weight.size(0), slice.hidden.units());
  fold_products(
      slice, out, [](int64_t tasks, const auto& f) { parallel(tasks, f); }, bytes_of(workspace, needed.bytes),
      packed_before);
}

void fold_products_op(const Tensor& hidden, const Tensor& weight, const Tensor& maximum, const Tensor& total,
                      const Tensor& moment, const Tensor& target, const Tensor& targets, int64_t first, double scale,
                      std::optional<double> softcap, const OptionalTensor& bias, const OptionalTensor& temperature,
                      bool entropy, const std::vector<Tensor>& candidates, const Tensor& workspace,
                      bool packed_before) {
  need_products();
  auto* typed =
      hidden.scalar_type() == ScalarType::Float ? fold_products_typed<Float32> : fold_products_typed<BFloat16>;
  typed(hidden, weight, maximum, total, moment, target, targets, first, scale, softcap, bias, temperature, entropy,
        candidates, workspace, packed_before);
}

// Weights and floors of the first rows; or nothing.
Tail tail_of(const std::vector<Tensor>& tail, double bias, int64_t rows) {
  if (tail.empty()) return {};
  check(tail.size() == 2 && rows >= LANES, "a tail is two tensors, made of sixteen rows");
  return {data<float>(tail[0], LANES), data<float>(tail[1], LANES), static_cast<float>(bias)};
}

template <class Format>
void grad_products_typed(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t first, double scale,
                         std::optional<double> softcap, const OptionalTensor& bias, const OptionalTensor& temperature,
                         const std::vector<Tensor>& per_row, const OptionalTensor& entropy_grad,
                         const OptionalTensor& hidden_sum, bool add_to_hidden, const OptionalTensor& weight_sum,
                         bool add_to_weight, const OptionalTensor& weight_grad, double weight_scale,
                         const OptionalTensor& bias_sum, const std::vector<Tensor>& tail, double tail_bias,
                         const OptionalTensor& addend, const OptionalTensor& addend_rows, const Tensor& workspace,
                         bool packed_before) {
  const int64_t rows = hidden.size(0), depth = hidden.size(1), entries = weight.size(0);
  check(per_row.size() == 5, "grad takes five coefficients of a row");
  const RowGradients<Format> g{data<float>(per_row[0], rows),
                               data<float>(per_row[1], rows),
                               data<float>(per_row[2], rows),
                               data<float>(per_row[3], rows),
                               data<float>(per_row[4], rows),
                               data<float>(entropy_grad, rows),
                               data<float>(hidden_sum, rows * depth),
                               add_to_hidden,
                               data<float>(weight_sum, entries * depth),
                               add_to_weight,
                               elements<Format>(weight_grad, weight),
                               static_cast<float>(weight_scale),
                               data<float>(bias_sum, entries),
                               tail_of(tail, tail_bias, rows),
                               addend ? data<float>(*addend, addend->size(0) * depth) : nullptr,
                               data<int32_t>(addend_rows, entries)};
  const auto slice = slice_of<Format>(hidden, weight, targets, first, scale, softcap, bias, temperature);
  const GradWorkspace needed(rows, entries, depth, Format::PER_UNIT, g.hidden, g.weight || g.weight_sum, g.bias);
  check(!add_to_weight || weight_sum.has_value(), "there is no sum to add to");
  grad_products(
      slice, g, [](int64_t tasks, const auto& f) { parallel(tasks, f); }, bytes_of(workspace, needed.bytes),
      packed_before);
}

void grad_products_op(const Tensor& hidden, const Tensor& weight, const Tensor& targets, int64_t first, double scale,
                      std::optional<double> softcap, const OptionalTensor& bias, const OptionalTensor& temperature,
                      const std::vector<Tensor>& per_row, const OptionalTensor& entropy_grad,
                      const OptionalTensor& hidden_sum, bool add_to_hidden, const OptionalTensor& weight_sum,
                      bool add_to_weight, const OptionalTensor& weight_grad, double weight_scale,
                      const OptionalTensor& bias_sum, const std::vector<Tensor>& tail, double tail_bias,
                      const OptionalTensor& addend, const OptionalTensor& addend_rows, const Tensor& workspace,
                      bool packed_before) {
  need_products();
  auto* typed =
      hidden.scalar_type() == ScalarType::Float ? grad_products_typed<Float32> : grad_products_typed<BFloat16>;
  typed(hidden, weight, targets, first, scale, softcap, bias, temperature, per_row, entropy_grad, hidden_sum,
        add_to_hidden, weight_sum, add_to_weight, weight_grad, weight_scale, bias_sum, tail, tail_bias, addend,
        addend_rows, workspace, packed_before);
}

int64_t fold_products_bytes(int64_t tokens, int64_t entries, int64_t depth, int64_t itemsize) {
  return FoldWorkspace(tokens, entries, ceil_div(depth * itemsize, 4)).bytes;
}

int64_t grad_products_bytes(int64_t tokens, int64_t entries, int64_t depth, int64_t itemsize, bool hidden, bool weight,
                            bool bias) {
  return GradWorkspace(tokens, entries, depth, 4 / itemsize, hidden, weight, bias).bytes;
}

#endif

}  // namespace
}  // namespace covgrpo

STABLE_TORCH_LIBRARY(covgrpo_cpp, m) {
  m.def(
      "fold(Tensor tile, Tensor(a!) maximum, Tensor(b!) total, Tensor(c!) moment, Tensor(d!) target, Tensor targets, "
      "int first, float scale, float? softcap, Tensor? bias, Tensor? temperature, bool entropy, "
      "Tensor[] candidates) -> ()");
  m.def(
      "grad(Tensor(a!) tile, Tensor targets, int first, float scale, float? softcap, Tensor? bias, "
      "Tensor? temperature, Tensor[] per_row, Tensor? entropy_grad) -> ()");
  m.def(
      "group_weights(Tensor logprobs, Tensor advantages, Tensor valid, Tensor[] scope, Tensor[] sequence, "
      "bool by_sequence, bool by_response, bool numel, float bandwidth_eps, Tensor(a!) weights, "
      "Tensor(b!) covariance, Tensor(c!) deviation, Tensor(d!) std) -> ()");
  m.def(
      "fold_products(Tensor hidden, Tensor weight, Tensor(a!) maximum, Tensor(b!) total, Tensor(c!) moment, "
      "Tensor(d!) target, Tensor targets, int first, float scale, float? softcap, Tensor? bias, Tensor? temperature, "
      "bool entropy, Tensor[] candidates, Tensor(e!) workspace, bool packed_before) -> ()");
  m.def(
      "grad_products(Tensor hidden, Tensor weight, Tensor targets, int first, float scale, float? softcap, "
      "Tensor? bias, Tensor? temperature, Tensor[] per_row, Tensor? entropy_grad, Tensor(a!)? hidden_sum, "
      "bool add_to_hidden, Tensor(b!)? weight_sum, bool add_to_weight, Tensor(c!)? weight_grad, float weight_scale, "
      "Tensor(d!)? bias_sum, Tensor[] tail, float tail_bias, Tensor? addend, Tensor? addend_rows, "
      "Tensor(e!) workspace, bool packed_before) -> ()");
  m.def("sparse_product(Tensor values, Tensor indices, Tensor offsets, Tensor matrix, Tensor(a!) out) -> ()");
  m.def("fold_products_bytes(int tokens, int entries, int depth, int itemsize) -> int");
  m.def(
      "grad_products_bytes(int tokens, int entries, int depth, int itemsize, bool hidden, bool weight, bool bias) "
      "-> int");
}

STABLE_TORCH_LIBRARY_IMPL(covgrpo_cpp, CPU, m) {
  m.impl("fold", TORCH_BOX(&covgrpo::fold));
  m.impl("grad", TORCH_BOX(&covgrpo::grad));
  m.impl("group_weights", TORCH_BOX(&covgrpo::group_weights));
  m.impl("sparse_product", TORCH_BOX(&covgrpo::sparse_product));
#if COVGRPO_X86
  m.impl("fold_products", TORCH_BOX(&covgrpo::fold_products_op));
  m.impl("grad_products", TORCH_BOX(&covgrpo::grad_products_op));
#endif
}

#if COVGRPO_X86
STABLE_TORCH_LIBRARY_IMPL(covgrpo_cpp, CompositeExplicitAutograd, m) {
  m.impl("fold_products_bytes", TORCH_BOX(&covgrpo::fold_products_bytes));
  m.impl("grad_products_bytes", TORCH_BOX(&covgrpo::grad_products_bytes));
}
#endif

// The instruction set in use. Raises RuntimeError where COVGRPO_CPU_ISA names none, or one the processor lacks.
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
