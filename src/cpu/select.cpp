#include "select.h"

#include "matrices.h"

namespace implicitdiff {
namespace {

template <class F, int W> Kernel map(Form form) {
  if constexpr (W > 1 && F::shares) {
    if (form == Form::rows_with_shared) return compiled<RowsWithShared<F, W>>();
  }
  switch (form) {
    case Form::single: return compiled<Single<F, W>>();
    case Form::row: return compiled<Row<F, W>>();
    default: return compiled<Rows<F, W>>();
  }
}

template <class F> Kernel map(int width, Form form) { return width == 1 ? map<F, 1>(form) : map<F, block_lanes>(form); }

template <class R> Kernel reduce(int width) {
  if (width == 1) return compiled_by_register<Reduction<R, 1>::template With>();
  return compiled_by_register<Reduction<R, block_lanes>::template With>();
}

template <class R> Kernel index(int width) {
  return width == 1 ? compiled<Index<R, 1>>() : compiled<Index<R, block_lanes>>();
}

template <int W> Kernel matrix(Op op) {
  switch (op) {
    case Op::LU: return compiled_by_register<Lu<W>::template With>();
    case Op::LU_SOLVE: return compiled_by_register<LuSolve<W>::template With>();
    case Op::CHOLESKY: return compiled_by_register<Cholesky<W>::template With>();
    case Op::SOLVE_LOWER: return compiled_by_register<Triangular<W, true, false>::template With>();
    case Op::SOLVE_UPPER: return compiled_by_register<Triangular<W, false, false>::template With>();
    case Op::SOLVE_UNIT_LOWER: return compiled_by_register<Triangular<W, true, true>::template With>();
    case Op::SOLVE_UNIT_UPPER: return compiled_by_register<Triangular<W, false, true>::template With>();
    default: return nullptr;
  }
}

Kernel rounded(Op op, int width, Form form) {
  using namespace formula;
  switch (op) {
    case Op::COPY: return map<Rounded<COPY>>(width, form);
    case Op::ADD: return map<Rounded<ADD>>(width, form);
    case Op::SUB: return map<Rounded<SUB>>(width, form);
    case Op::MUL: return map<Rounded<MUL>>(width, form);
    case Op::DIV: return map<Rounded<DIV>>(width, form);
    default: return nullptr;
  }
}

}  // namespace

bool rounds(Op op) { return rounded(op, 1, Form::row) != nullptr; }

Kernel elementwise_kernel(Op op, int width, bool round, Form form) {
  if (round) return rounded(op, width, form);
  switch (op) {
#define X(name, ...) \
  case Op::name: return map<formula::name>(width, form);
    IMPLICITDIFF_ELEMENTWISE(X)
#undef X
    default: return nullptr;
  }
}

Kernel reduction_kernel(Op op, int width) {
  switch (op) {
#define X(name, ...) \
  case Op::name: return reduce<formula::name>(width);
    IMPLICITDIFF_REDUCTIONS(X)
#undef X
#define X(name, ...) \
  case Op::name: return index<formula::name>(width);
    IMPLICITDIFF_INDICES(X)
#undef X
    default: return nullptr;
  }
}

Kernel matrix_kernel(Op op, int width) { return width == 1 ? matrix<1>(op) : matrix<block_lanes>(op); }

Kernel product_of_lanes_kernel(bool a_shared, bool b_shared) {
  if (a_shared && b_shared) return compiled_by_register<ProductOfLanes<One, One, block_lanes>::With>();
  if (a_shared) return compiled_by_register<ProductOfLanes<One, Each, block_lanes>::With>();
  if (b_shared) return compiled_by_register<ProductOfLanes<Each, One, block_lanes>::With>();
  return compiled_by_register<ProductOfLanes<Each, Each, block_lanes>::With>();
}

Kernel product_by_columns_kernel() { return compiled_by_register<ProductByColumns>(); }
Kernel product_by_rows_kernel() { return compiled_by_register<ProductByRows>(); }

Kernel any_product_kernel(int width) {
  if (width == 1) return compiled_by_register<SumOfProducts<1>::With>();
  return compiled_by_register<SumOfProducts<block_lanes>::With>();
}

}  // namespace implicitdiff
