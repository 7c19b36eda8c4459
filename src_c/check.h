/* check.h: is this call valid? One function per verb, called before anything is written, with the arguments of
 * fastbn.h. Each takes the same time for every shape.
 */
#ifndef FBN_CHECK_H
#define FBN_CHECK_H

#include "fastbn.h"

int fbn_valid_channels(int64_t channels);
fbn_status fbn_check_problem(const fbn_problem *problem);
fbn_status fbn_check_forward(const fbn_problem *problem, const fbn_forward_args *args, const void *workspace);
fbn_status fbn_check_infer(const fbn_problem *problem, const fbn_infer_args *args, const void *workspace);
fbn_status fbn_check_apply(const fbn_problem *problem, const fbn_apply_args *args, const void *workspace);
fbn_status fbn_check_plan_set(const fbn_problem *problem, const fbn_plan_args *args, const void *plan);
fbn_status fbn_check_plan_run(const fbn_problem *problem, const fbn_run_args *args, const void *plan);
fbn_status fbn_check_moments(const fbn_problem *problem, const fbn_moments_args *args, const void *workspace);
fbn_status fbn_check_backward_sums(const fbn_problem *problem, const fbn_sums_args *args, const void *workspace);
fbn_status fbn_check_backward(const fbn_problem *problem, const fbn_backward_args *args, const void *workspace);

/* The arguments that fbn_backward has in common with fbn_backward_sums. */
fbn_sums_args fbn_inputs_of(const fbn_backward_args *args);

#endif
