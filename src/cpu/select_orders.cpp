#include "orders.h"
#include "orthogonal.h"
#include "select.h"
#include "singular.h"

namespace implicitdiff {
namespace {

template <int W> Kernel order(Op op) {
  switch (op) {
    case Op::SORT: return compiled<Sort<Ascending, W>>();
    case Op::SORT_DESCENDING: return compiled<Sort<Descending, W>>();
    case Op::GATHER: return compiled<Gather<W>>();
    case Op::SCATTER: return compiled<Scatter<false, W>>();
    case Op::SCATTER_ADD: return compiled<Scatter<true, W>>();
    case Op::CUMSUM: return compiled<Running<formula::SUM, W>>();
    case Op::CUMPROD: return compiled<Running<formula::PROD, W>>();
    default: return nullptr;
  }
}

template <int W> Kernel orthogonal(Op op) {
  switch (op) {
    case Op::QR: return compiled_by_register<Qr<W>::template With>();
    case Op::APPLY_Q: return compiled_by_register<ApplyQ<W, false>::template With>();
    case Op::APPLY_Q_TRANSPOSED: return compiled_by_register<ApplyQ<W, true>::template With>();
    case Op::EIGH: return compiled<Eigh<W>>();
    case Op::SVD: return compiled<Svd<W>>();
    default: return nullptr;
  }
}

}  // namespace

Kernel order_kernel(Op op, int width) { return width == 1 ? order<1>(op) : order<block_lanes>(op); }
Kernel orthogonal_kernel(Op op, int width) { return width == 1 ? orthogonal<1>(op) : orthogonal<block_lanes>(op); }

}  // namespace implicitdiff
