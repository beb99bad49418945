"""The public names of the libraries that docs/migrating.md is about, as of the versions named, module by module."""

from __future__ import annotations

TORCHOPT_0_7_3 = {
    "": """accelerated_op_available adam adamax adadelta radam adamw adagrad rmsprop sgd clip_grad_norm nan_to_num
        register_hook chain Optimizer SGD Adam AdaMax Adamax AdaDelta Adadelta RAdam AdamW AdaGrad Adagrad RMSProp
        RMSprop MetaOptimizer MetaSGD MetaAdam MetaAdaMax MetaAdamax MetaAdaDelta MetaAdadelta MetaRAdam MetaAdamW
        MetaAdaGrad MetaAdagrad MetaRMSProp MetaRMSprop FuncOptimizer apply_updates
        extract_state_dict recover_state_dict stop_gradient module_clone module_detach_""",
    "accelerated_op": "is_available AdamOp",
    "alias.utils": "flip_sign_and_add_weight_decay scale_by_neg_lr",
    "base": "EmptyState UninitializedState GradientTransformation ChainedGradientTransformation identity",
    "combine": "chain_flat",
    "diff.implicit": "custom_root ImplicitMetaGradientModule",
    "diff.zero_order": "zero_order ZeroOrderGradientModule",
    "distributed": """is_available TensorDimensionPartitioner dim_partitioner batch_partitioner mean_reducer sum_reducer
        remote_async_call remote_sync_call parallelize parallelize_async parallelize_sync get_world_info get_world_rank
        get_rank get_world_size get_local_rank get_local_world_size get_worker_id barrier auto_init_rpc on_rank
        not_on_rank rank_zero_only rank_non_zero_only""",
    "distributed.autograd": "context",
    "hook": "zero_nan_hook nan_to_num_hook register_hook",
    "linalg": "cg ns ns_inv",
    "linear_solve": "solve_cg solve_normal_cg solve_inv",
    "nn": """MetaGradientModule ImplicitMetaGradientModule ZeroOrderGradientModule reparametrize reparameterize
        swap_state""",
    "pytree": """tree_flatten_as_tuple tree_pos tree_neg tree_add tree_add_scalar_mul tree_sub tree_sub_scalar_mul
        tree_mul tree_matmul tree_scalar_mul tree_truediv tree_vdot_real tree_wait tree_as_rref tree_to_here""",
    "schedule": "exponential_decay polynomial_schedule linear_schedule",
    "transform": """trace scale scale_by_schedule add_decayed_weights masked scale_by_adam scale_by_adamax
        scale_by_adadelta scale_by_radam scale_by_accelerated_adam scale_by_rss scale_by_rms scale_by_stddev
        nan_to_num""",
    "transform.utils": "tree_map_flat tree_map_flat_ inc_count update_moment",
    "typing": """GradientTransformation ChainedGradientTransformation EmptyState UninitializedState Params Updates
        OptState Scalar Numeric Schedule ScalarOrSchedule PyTree Tensor OptionalTensor ListOfTensors TupleOfTensors
        SequenceOfTensors TensorOrTensors TensorTree ListOfOptionalTensors TupleOfOptionalTensors
        SequenceOfOptionalTensors OptionalTensorOrOptionalTensors OptionalTensorTree TensorContainer
        ModuleTensorContainers Future LinearSolver Device Size Distribution SampleFunc Samplable""",
    "utils": "ModuleState stop_gradient extract_state_dict recover_state_dict module_clone module_detach_",
    "visual": "make_dot resize_graph",
}

JAXOPT_0_8_5 = {
    "": """AndersonAcceleration AndersonWrapper ArmijoSGD OptStep BacktrackingLineSearch BFGS Bisection
        BlockCoordinateDescent Broyden BoxCDQP CvxpyQP EqualityConstrainedQP FixedPointIteration GaussNewton
        GradientDescent HagerZhangLineSearch IterativeRefinement LBFGS LBFGSB LevenbergMarquardt MirrorDescent
        NonlinearCG OptaxSolver BoxOSQP OSQP PolyakSGD ProjectedGradient ProximalGradient ScipyBoundedLeastSquares
        ScipyBoundedMinimize ScipyLeastSquares ScipyMinimize ScipyRootFinding ZoomLineSearch""",
    "base": "AutoOrBoolean IterativeSolver LinearOperator OptStep StochasticSolver KKTSolution",
    "cond": "cond",
    "implicit_diff": "custom_root custom_fixed_point root_jvp root_vjp",
    "isotonic": "isotonic_l2_pav",
    "linear_solve": """solve_lu solve_cholesky solve_qr solve_inv solve_cg solve_normal_cg solve_gmres solve_bicgstab
        solve_iterative_refinement""",
    "loop": "while_loop",
    "loss": """binary_logistic_loss binary_sparsemax_loss sparse_plus sparse_sigmoid huber_loss make_fenchel_young_loss
        multiclass_logistic_loss multiclass_sparsemax_loss binary_hinge_loss binary_perceptron_loss
        multiclass_hinge_loss multiclass_perceptron_loss""",
    "objective": """CompositeLinearFunction least_squares ridge_regression binary_logreg multiclass_logreg
        multiclass_logreg_with_intercept l2_multiclass_logreg l2_multiclass_logreg_with_intercept
        multiclass_linear_svm_dual""",
    "perturbations": "Gumbel Normal make_perturbed_argmax make_perturbed_max make_perturbed_fun",
    "projection": """projection_non_negative projection_box projection_hypercube projection_simplex
        projection_sparse_simplex projection_l1_sphere projection_l1_ball projection_l2_sphere projection_l2_ball
        projection_linf_ball projection_hyperplane projection_halfspace projection_affine_set projection_polyhedron
        projection_box_section projection_transport projection_birkhoff kl_projection_transport
        kl_projection_birkhoff""",
    "prox": """make_prox_from_projection prox_none prox_lasso prox_non_negative_lasso prox_elastic_net prox_group_lasso
        prox_ridge prox_non_negative_ridge""",
    "tree_util": """broadcast_pytrees tree_map tree_reduce tree_add tree_sub tree_mul tree_scalar_mul
        tree_add_scalar_mul tree_dot tree_vdot tree_vdot_real tree_div tree_sum tree_l2_norm tree_where tree_zeros_like
        tree_ones_like tree_negative tree_inf_norm tree_conj tree_real tree_imag""",
}

TORCHDEQ_0_1_0 = {
    "": "add_deq_args register_deq get_deq reset_deq",
    "core": "DEQSliced DEQIndexing",
    "dropout": """VariationalDropout VariationalDropout1d VariationalDropout2d VariationalDropout3d
        VariationalDropToken1d VariationalDropToken2d VariationalDropToken3d reset_dropout""",
    "grad": "backward_factory",
    "loss": "fp_correction register_weight_func jac_reg power_method",
    "norm": "apply_norm register_norm register_norm_module remove_norm reset_norm SpectralNorm WeightNorm",
    "solver": """register_solver get_solver solver_stat_from_final_step anderson_solver broyden_solver fixed_point_iter
        simple_fixed_point_iter SolverStat""",
    "solver.utils": """init_solver_info batch_masked_mixing batch_flatten update_state solver_stat_from_info
        dummy_solver_stat""",
    "utils": "mixed_init mem_gc DEQConfig DEQWrapper MDEQWrapper SpeedyMDEQWrapper deq_decorator",
}
