/* check.h: is this call valid? One question per verb, asked before anything is written; arguments as in fastbn.h.
 * Each takes the same time for any shape.
 */
#ifndef FBN_CHECK_H
#define FBN_CHECK_H

#include "fastbn.h"

int fbn_valid_channels(int64_t channels);
fbn_status fbn_check_problem(const fbn_problem *problem);
fbn_status fbn_check_forward(const fbn_problem *problem, const void *x, const void *residual,
                             const fbn_parameters *parameters, double eps, const fbn_running *running, const void *y,
                             const double *saved, const void *workspace);
fbn_status fbn_check_infer(const fbn_problem *problem, const void *x, const void *residual,
                           const fbn_parameters *parameters, double eps, const void *mean, const void *var,
                           const void *y, const double *saved, const void *workspace);
fbn_status fbn_check_plan_set(const fbn_problem *problem, const fbn_parameters *parameters, double eps,
                              const void *mean, const void *var, const void *plan);
fbn_status fbn_check_plan_run(const fbn_problem *problem, const void *x, const void *residual, const void *y,
                              const void *plan);
fbn_status fbn_check_moments(const fbn_problem *problem, const void *x, const double *moments, const void *workspace);
fbn_status fbn_check_backward_sums(const fbn_problem *problem, const void *dy, const void *x, const void *residual,
                                   const double *saved, int from_y, const double *sums, const void *workspace);
fbn_status fbn_check_backward(const fbn_problem *problem, const void *dy, const void *x, const void *residual,
                              const double *saved, const fbn_called *called, const void *dx, const void *dresidual,
                              const void *dgamma, const void *dbeta, const void *workspace);

#endif
