// GELU in its exact form, h * Phi(h), and what its slope takes: Phi(h) + h * phi(h).
#pragma once

#include "common.h"

namespace minisora {

// Phi(h), the normal distribution, within 2e-7: Phi(h) - 1/2 = h P(h^2) / Q(h^2) for |h| < 5.6. The coefficients
// minimise the maximal error (9e-9 before rounding). Beyond 5.6 Phi is 0 or 1 in fp32, and the bound of 1/2 holds. This
// costs half as much as the common form with an exponential.
MINISORA_INLINE inline Vec distribution(Vec h) {
  const Vec u = at::vec::clamp_max(h * h, Vec(5.6f * 5.6f));
  Vec p(2.2145276e-08f), q(1.1802094e-06f);
  for (const float c : {6.3565135e-06f, 1.7385009e-04f, 4.7072559e-03f, 3.4376059e-02f, 3.9894223e-01f})
    p = at::vec::fmadd(p, u, Vec(c));
  for (const float c : {7.5101634e-05f, 1.9129748e-03f, 2.8940057e-02f, 2.5283372e-01f, 1.0f})
    q = at::vec::fmadd(q, u, Vec(c));
  return Vec(0.5f) + at::vec::clamp(h * p / q, Vec(-0.5f), Vec(0.5f));
}

// phi(h), its density
MINISORA_INLINE inline Vec density(Vec h) { return Vec(0.3989422804014327f) * (h * h * Vec(-0.5f)).exp_u20(); }

} // namespace minisora
