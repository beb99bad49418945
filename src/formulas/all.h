// The formulas by name, each with its variants.
#pragma once

#include <stdexcept>
#include <string>

#include "adadelta.h"
#include "adagrad.h"
#include "adam.h"
#include "adamax.h"
#include "radam.h"
#include "rmsprop.h"
#include "sgd.h"

namespace implicitdiff {

template <class F> struct Tag {
  using type = F;
};

// Calls body with the Tag of the named formula.
template <class R, class Body> decltype(auto) with_formula(const std::string& name, Body&& body) {
  if (name == "sgd") return body(Tag<Sgd<R, false>>{});
  if (name == "sgd_momentum") return body(Tag<Sgd<R, true>>{});
  if (name == "adam") return body(Tag<Adam<R, false>>{});
  if (name == "adam_amsgrad") return body(Tag<Adam<R, true>>{});
  if (name == "rmsprop") return body(Tag<Rmsprop<R, false, false>>{});
  if (name == "rmsprop_centered") return body(Tag<Rmsprop<R, true, false>>{});
  if (name == "rmsprop_momentum") return body(Tag<Rmsprop<R, false, true>>{});
  if (name == "rmsprop_centered_momentum") return body(Tag<Rmsprop<R, true, true>>{});
  if (name == "adagrad") return body(Tag<Adagrad<R>>{});
  if (name == "adadelta") return body(Tag<Adadelta<R>>{});
  if (name == "adamax") return body(Tag<Adamax<R>>{});
  if (name == "radam") return body(Tag<Radam<R>>{});
  throw std::invalid_argument("unknown formula '" + name + "'");
}

}  // namespace implicitdiff
