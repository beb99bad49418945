// Kernels of the machine's instructions, each for the instruction set of this computer.
#pragma once

#include "kernels.h"

namespace implicitdiff {

// Whether there is a kernel that rounds the results of an elementwise operation to single precision.
bool rounds(Op op);

// How the elements of an elementwise operation lie: one, in one dimension, in several, or some in shared arrays.
enum class Form { single, row, rows, rows_with_shared };

Kernel elementwise_kernel(Op op, int width, bool round, Form form);
Kernel reduction_kernel(Op op, int width);
Kernel matrix_kernel(Op op, int width);
Kernel orthogonal_kernel(Op op, int width);
Kernel order_kernel(Op op, int width);

// Products by which operands are shared, and of one lane by what is contiguous; `any` is not split over threads.
Kernel product_of_lanes_kernel(bool a_shared, bool b_shared);
Kernel product_by_columns_kernel();
Kernel product_by_rows_kernel();
Kernel any_product_kernel(int width);

}  // namespace implicitdiff
