#include "program.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "select.h"

namespace implicitdiff {

void refuse(std::size_t at, const std::string& name, const std::string& problem) {
  throw std::invalid_argument("instruction " + std::to_string(at) + (name.empty() ? "" : " (" + name + ")") + ": " +
                              problem);
}

Op operation(const Integers& given, std::size_t at) {
  if (given.empty()) refuse(at, "", "it is empty");
  if (given[0] < 0 || given[0] >= std::int64_t(std::size(operations))) {
    refuse(at, "", "there is no operation " + std::to_string(given[0]));
  }
  return Op(given[0]);
}

namespace {

struct Reference {
  std::int64_t space, offset;
  Integers strides;
};

// An instruction that is read and checked.
struct Given {
  Op op;
  bool round;
  Integers sizes;
  std::vector<Reference> references;

  Kind kind() const { return operations[int(op)].kind; }
};

// Reads an instruction, number by number.
class Reader {
 public:
  Reader(const Integers& given, std::size_t at, const Memory& memory) : given(given), at(at), memory(memory) {}

  Given read() {
    Given result;
    result.op = operation(given, at);
    name = operations[given[0]].name;
    next = 1;
    result.round = number(0, 1, "the flag of rounding") == 1;
    result.sizes.resize(number(0, most_dimensions, "the number of dimensions"));
    for (std::int64_t& size : result.sizes) size = number(0, most_elements, "a size");
    const int count = references(result.kind()).all;
    number(count, count, "the number of references");
    for (int i = 0; i < count; ++i) result.references.push_back(reference(result.sizes.size()));
    if (next != given.size()) wrong("it has " + std::to_string(given.size() - next) + " numbers too many");
    check_sizes(result);
    for (int i = 0; i < count; ++i) check_reference(result, i);
    return result;
  }

 private:
  [[noreturn]] void wrong(const std::string& problem) const { refuse(at, name, problem); }

  std::int64_t number(std::int64_t least, std::int64_t most, const char* what) {
    if (next == given.size()) wrong("it ends before " + std::string(what));
    const std::int64_t x = given[next++];
    if (x < least || x > most) wrong(std::string(what) + " is " + std::to_string(x) + bounds(least, most));
    return x;
  }

  static std::string bounds(std::int64_t least, std::int64_t most) {
    if (least == most) return ", not " + std::to_string(least);
    return ", which is not between " + std::to_string(least) + " and " + std::to_string(most);
  }

  Reference reference(std::size_t dimensions) {
    Reference result;
    result.space = number(0, std::int64_t(memory.shared.size()), "a space");
    result.offset = number(0, most_elements, "an offset");
    result.strides.resize(dimensions);
    for (std::int64_t& stride : result.strides) stride = number(-most_elements, most_elements, "a stride");
    return result;
  }

  void check_sizes(const Given& g) const {
    double product = 1;
    for (std::int64_t size : g.sizes) product *= double(std::max<std::int64_t>(size, 1));
    if (product > double(most_elements)) wrong("its sizes are too large");
    const std::size_t d = g.sizes.size();
    switch (g.kind()) {
      case Kind::bound:
      case Kind::index:
        if (d > 0 && g.sizes[d - 1] == 0) wrong("it reduces no elements, for which it has no result");
        [[fallthrough]];
      case Kind::reduction:
      case Kind::matmul:
        if (d == 0) wrong("it has no dimension to reduce");
        break;
      case Kind::gather:
        if (d > 0 && g.sizes[d - 1] == 0) wrong("it reads one of no elements");
        [[fallthrough]];
      case Kind::scatter:
      case Kind::sort:
      case Kind::running:
        if (d == 0) wrong("it has no dimension");
        break;
      case Kind::apply_q:
        if (d != 3) wrong("it has " + std::to_string(d) + " dimensions, not 3");
        if (g.sizes[2] > g.sizes[0]) wrong("it has more reflections than rows");
        break;
      case Kind::svd:
        if (d == 2 && g.sizes[0] < g.sizes[1]) wrong("it has fewer rows than columns");
        if (d != 2) wrong("it has " + std::to_string(d) + " dimensions, not 2");
        break;
      case Kind::lu:
      case Kind::cholesky:
      case Kind::eigh:
        if (d == 2 && g.sizes[0] != g.sizes[1]) wrong("its matrix is not square");
        [[fallthrough]];
      case Kind::lu_solve:
      case Kind::triangular:
      case Kind::qr:
        if (d != 2) wrong("it has " + std::to_string(d) + " dimensions, not 2");
        break;
      default: break;
    }
  }

  // Sizes of what reference i reads or writes.
  static Integers extent(const Given& g, int i) {
    const std::int64_t n = g.sizes.empty() ? 0 : g.sizes[0];
    const Integers element = {1, 1}, vector = {n, 1}, square = {n, n};
    Integers one = g.sizes;  // element of the last dimension
    if (!one.empty()) one.back() = 1;
    switch (g.kind()) {
      case Kind::lu: return i == 1 ? vector : i == 2 ? element : square;
      case Kind::lu_solve: return i == 1 ? square : i == 2 ? vector : g.sizes;
      case Kind::cholesky: return i == 1 ? element : square;
      case Kind::triangular: return i == 1 ? square : g.sizes;
      case Kind::qr: return i == 1 ? Integers{std::min(n, g.sizes[1]), 1} : g.sizes;
      case Kind::eigh: return i == 1 ? vector : square;
      case Kind::svd: return i == 1 ? Integers{g.sizes[1], 1} : i == 2 ? Integers{g.sizes[1], g.sizes[1]} : g.sizes;
      case Kind::apply_q:
        if (i == 1) return {n, 1, g.sizes[2]};
        if (i == 2) return {1, 1, g.sizes[2]};
        return {n, g.sizes[1], 1};
      case Kind::gather: return i == 2 ? one : g.sizes;
      case Kind::scatter: return i == 0 ? g.sizes : one;
      default: return g.sizes;
    }
  }

  void check_reference(const Given& g, int i) const {
    const Reference& r = g.references[i];
    const bool output = i < references(g.kind()).outputs;
    const std::string what = output ? "an output" : "input " + std::to_string(i - references(g.kind()).outputs);
    if (r.space != 0) {
      if (output) wrong(what + " is a shared array");
      if (!shares(g.kind())) wrong(what + " is a shared array, which this operation does not read");
    }
    Integers sizes = extent(g, i);
    if (output && reduces(g.kind())) sizes.back() = 1;  // the result is one element, whatever its stride, even of none
    const double limit = double(r.space == 0 ? memory.arena : memory.shared[r.space - 1]);
    const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    double lowest = double(r.offset), highest = empty ? lowest - 1 : lowest;
    for (std::size_t d = 0; d < sizes.size() && !empty; ++d) {
      const double reach = double(sizes[d] - 1) * double(r.strides[d]);
      (reach < 0 ? lowest : highest) += reach;
    }
    if (lowest < 0 || highest >= limit) {
      wrong(what + " reaches out of " + (r.space == 0 ? "the arena" : "shared array " + std::to_string(r.space - 1)));
    }
  }

  const Integers& given;
  const std::size_t at;
  const Memory& memory;
  std::string name;
  std::size_t next = 0;
};

// Builds the instruction that runs.
class Builder {
 public:
  Builder(const Given& g, const Memory& memory) : g(g), width(memory.width) {
    for (std::size_t d = 0; d < g.sizes.size(); ++d) {
      Dimension dimension{g.sizes[d], {}};
      for (std::size_t i = 0; i < g.references.size(); ++i) dimension.step[i] = scaled(i, g.references[i].strides[d]);
      dimensions.push_back(dimension);
    }
    for (std::size_t i = 0; i < g.references.size(); ++i) {
      q.at[i].space = g.references[i].space;
      q.at[i].offset = scaled(i, g.references[i].offset);
      shared = shared || q.at[i].space != 0;
    }
  }

  Instruction build() {
    switch (g.kind()) {
      case Kind::reduction:
      case Kind::bound:
      case Kind::index: reduction(); break;
      case Kind::sort:
      case Kind::gather:
      case Kind::scatter:
      case Kind::running:
        reduction();
        q.kernel = order_kernel(g.op, width);
        break;
      case Kind::qr:
      case Kind::apply_q:
      case Kind::eigh:
      case Kind::svd:
        matrix();
        q.kernel = orthogonal_kernel(g.op, width);
        break;
      case Kind::matmul: product(); break;
      case Kind::lu:
      case Kind::lu_solve:
      case Kind::cholesky:
      case Kind::triangular: matrix(); break;
      default: elementwise();
    }
    return q;
  }

 private:
  std::int64_t scaled(std::size_t i, std::int64_t elements) const {
    return g.references[i].space == 0 ? elements * width : elements;
  }

  void elementwise() {
    merge();
    if (dimensions.empty()) dimensions.push_back({1, {}});
    inner(dimensions.back());
    dimensions.pop_back();
    outer();
    q.kernel = elementwise_kernel(g.op, width, g.round && rounds(g.op), form());
  }

  Form form() const {
    if (shared) return width > 1 ? Form::rows_with_shared : Form::rows;
    return q.outer > 0 ? Form::rows : q.n > 1 ? Form::row : Form::single;
  }

  void reduction() {
    inner(dimensions.back());
    dimensions.pop_back();
    merge();
    outer();
    q.kernel = reduction_kernel(g.op, width);
  }

  void matrix() {
    outer();
    q.kernel = matrix_kernel(g.op, width);
  }

  void product() {
    while (dimensions.size() < 3) dimensions.insert(dimensions.begin(), {1, {}});
    Dimension k = dimensions.back();
    dimensions.pop_back();
    Dimension j = dimensions.back(), i = *(dimensions.end() - 2);
    for (Dimension* each : {&i, &j, &k}) {
      if (each->size == 1) std::fill(std::begin(each->step), std::end(each->step), 0);
    }
    if (j.step[1] != 0 || i.step[2] != 0) {
      inner(k);
      merge();
      outer();
      q.kernel = any_product_kernel(width);
      return;
    }
    dimensions.resize(dimensions.size() - 2);
    merge();
    outer();
    if (width > 1) {
      if (i.size == 1) transpose(i, j, k);
      q.kernel = product_of_lanes_kernel(q.at[1].space != 0, q.at[2].space != 0);
    } else {
      product_of_one_lane(i, j, k);
    }
    append(i), append(j), append(k);
    if (q.kernel == any_product_kernel(width)) q.outer += 2, inner(k);
  }

  void product_of_one_lane(Dimension& i, Dimension& j, Dimension& k) {
    double work = double(i.size) * double(j.size) * double(k.size);
    for (int d = 0; d < q.outer; ++d) work *= double(q.dimensions[d].size);
    q.large = work >= 65536;
    const bool rows_lie = i.step[0] == 1 && i.step[1] == 1, columns_lie = j.step[0] == 1 && j.step[2] == 1;
    if (columns_lie || rows_lie) {
      if (!columns_lie) transpose(i, j, k);
      q.kernel = product_by_columns_kernel();
    } else if ((k.step[1] == 1 && k.step[2] == 1) || k.size <= 1) {
      if (i.size < j.size) transpose(i, j, k);
      q.kernel = product_by_rows_kernel();
    } else {
      q.kernel = any_product_kernel(width);
      q.large = false;
    }
  }

  // Of a product: r^T = b^T a^T.
  void transpose(Dimension& i, Dimension& j, Dimension& k) {
    std::swap(i, j);
    std::swap(q.at[1], q.at[2]);
    for (Dimension* each : {&i, &j, &k}) std::swap(each->step[1], each->step[2]);
    for (int d = 0; d < q.outer; ++d) std::swap(q.dimensions[d].step[1], q.dimensions[d].step[2]);
  }

  // Orders dimensions by the step of the output and makes one of each two that all operands pass through as one.
  void merge() {
    std::vector<Dimension> merged;
    const auto far = [](const Dimension& d) { return std::abs(d.step[0]); };
    std::stable_sort(dimensions.begin(), dimensions.end(),
                     [&](const Dimension& a, const Dimension& b) { return far(a) > far(b); });
    for (const Dimension& d : dimensions) {
      if (d.size == 1) continue;
      if (!merged.empty() && continues(merged.back(), d)) {
        const std::int64_t size = merged.back().size * d.size;
        merged.back() = d;
        merged.back().size = size;
      } else {
        merged.push_back(d);
      }
    }
    dimensions = merged;
  }

  static bool continues(const Dimension& outer, const Dimension& inner) {
    for (int i = 0; i < most_references; ++i) {
      if (outer.step[i] != inner.step[i] * inner.size) return false;
    }
    return true;
  }

  void inner(const Dimension& d) {
    q.n = d.size;
    for (int i = 0; i < most_references; ++i) q.at[i].step = d.step[i];
  }

  void outer() {
    q.outer = 0;
    for (const Dimension& d : dimensions) append(d), ++q.outer;
    end = q.outer;
  }

  void append(const Dimension& d) { q.dimensions[end++] = d; }

  const Given& g;
  const int width;
  std::vector<Dimension> dimensions;
  Instruction q{};
  bool shared = false;
  int end = 0;
};

bool has_results(const Given& g) {
  const Kind kind = g.kind();
  if (kind == Kind::lu || kind == Kind::cholesky) return true;  // of no elements, info
  const auto end = g.sizes.end() - (reduces(kind) ? 1 : 0);
  return std::all_of(g.sizes.begin(), end, [](std::int64_t size) { return size > 0; });
}

// A copy of the first output into itself that rounds.
Given rounding(const Given& g) {
  Given result{Op::COPY, true, g.sizes, {g.references[0], g.references[0]}};
  if (reduces(g.kind())) {
    result.sizes.pop_back();
    for (Reference& r : result.references) r.strides.pop_back();
  }
  return result;
}

}  // namespace

std::vector<Instruction> instructions(const Integers& given, std::size_t at, const Memory& memory) {
  const Given g = Reader(given, at, memory).read();
  if (!has_results(g)) return {};
  std::vector<Instruction> result = {Builder(g, memory).build()};
  if (g.round && !rounds(g.op)) {
    const Given second = rounding(g);
    if (has_results(second)) result.push_back(Builder(second, memory).build());
  }
  return result;
}

}  // namespace implicitdiff
