"""Metrics: accumulators that are States."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf
from statefun import metrics


def test_a_mean_is_that_of_all_values_given():
    mean = metrics.Mean()
    update = sf.filter_jit(mean.update)
    update(jnp.array([1.0, 2.0]))
    update(jnp.array([6.0]))
    assert float(mean.compute()) == 3.0


def test_a_mean_without_data_is_nan():
    mean = metrics.Mean()
    assert np.isnan(mean.compute())
    mean.update(jnp.array([1.0]), jnp.array([False]))
    assert np.isnan(mean.compute())


def test_weights_and_masks_count():
    mean = metrics.Mean()
    mean.update(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
    mean.update(jnp.array([4.0]), 2.0)
    assert float(mean.compute()) == 3.0


def test_weights_that_do_not_broadcast_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        metrics.Mean().update(jnp.ones(3), jnp.ones(2))


def test_reset_starts_again():
    mean = metrics.Mean()
    mean.update(jnp.array([1.0]))
    mean.reset()
    assert np.isnan(mean.compute())
    mean.update(jnp.array([5]))
    assert float(mean.compute()) == 5.0


def test_a_mean_of_half_precision_is_accumulated_in_single_precision():
    mean = metrics.Mean()
    for _ in range(3):
        mean.update(jnp.full(1000, 0.1, jnp.bfloat16))
    np.testing.assert_allclose(mean.compute(), float(jnp.bfloat16(0.1)), rtol=1e-5)


def test_a_mean_sums_over_lanes_with_an_axis_name():
    mean = metrics.Mean(axis_name="batch")
    sf.filter_vmap(mean.update, axis_name="batch")(jnp.array([1.0, 2.0, 6.0]))
    assert float(mean.compute()) == 3.0


def test_a_mean_without_an_axis_name_is_refused_in_lanes():
    mean = metrics.Mean()
    with pytest.raises(
        sf.StateTraceError, match="a value that differs along the mapped"
    ):
        sf.filter_vmap(mean.update)(jnp.array([1.0, 2.0, 6.0]))
    assert np.isnan(mean.compute())


def test_a_wrong_axis_name_is_an_error_that_says_so():
    accuracy = metrics.Accuracy(axis_name="batch")
    message = "a metric was updated outside of its mapped axes 'batch'"
    with pytest.raises(NameError, match=message):
        accuracy.update(jnp.array([1]), jnp.array([1]))
    with pytest.raises(NameError, match=message):
        sf.filter_vmap(accuracy.update, axis_name="other")(jnp.eye(2), jnp.arange(2))
    assert jnp.isnan(accuracy.compute())


def test_a_mean_accumulates_in_scan_and_takes_no_part_in_gradients():
    mean = metrics.Mean()

    def loss(w):
        sf.scan(lambda _, x: (None, mean.update(w * x)), None, jnp.arange(4.0))
        return w**2

    assert float(sf.filter_grad(loss)(jnp.array(3.0))) == 6.0
    assert float(mean.compute()) == 4.5


def test_accuracy_takes_logits_and_classes():
    accuracy = metrics.Accuracy()
    update = sf.filter_jit(accuracy.update)
    update(jnp.array([[2.0, 1.0], [0.0, 5.0]]), jnp.array([0, 0]))
    assert float(accuracy.compute()) == 0.5
    update(jnp.array([1, 2]), jnp.array([1, 2]))
    assert float(accuracy.compute()) == 0.75
    accuracy.reset()
    assert np.isnan(accuracy.compute())


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (jnp.ones((3, 2)), jnp.ones(4, int), r"predictions of shape \(3, 2\)"),
        (jnp.ones(3), jnp.ones(3, int), "predictions of dtype float32"),
    ],
)
def test_accuracy_refuses_what_does_not_go_together(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.Accuracy().update(predictions, labels)


class Total:
    """As a metric of a library."""

    def __init__(self, total):
        self.total = total

    @classmethod
    def empty(cls):
        return cls(jnp.array(0.0))

    @classmethod
    def from_model_output(cls, values):
        return cls(jnp.sum(values))

    def merge(self, other):
        return Total(self.total + other.total)

    def compute(self):
        return self.total


jax.tree_util.register_pytree_node(
    Total, lambda t: ((t.total,), None), lambda _, c: Total(*c)
)


def test_a_metric_of_a_library_accumulates_in_its_dtype():
    traces = []
    metric = metrics.Metric(Total)

    @sf.filter_jit
    def step(x):
        traces.append(1)
        metric.update(x)

    step(jnp.arange(3))
    step(jnp.arange(4))
    step(jnp.arange(4))
    assert float(metric.compute()) == 15.0
    assert metric.state.value.total.dtype == jnp.float32
    assert len(traces) == 2  # one for each shape
    sf.scan(lambda _, x: (None, metric.update(x)), None, jnp.arange(3))
    assert float(metric.compute()) == 18.0
    metric.reset()
    assert float(metric.compute()) == 0.0


def test_a_class_that_is_no_metric_is_refused():
    with pytest.raises(TypeError, match="which has no empty, from_model_output, merge"):
        metrics.Metric(dict)


def test_metrics_of_metrax_equal_the_library_used_by_hand():
    metrax = pytest.importorskip("metrax")
    key = jax.random.key(0)
    batches = []
    for k in jax.random.split(key, 3):
        predictions = jax.random.uniform(k, (16,))
        batches.append((predictions, (predictions + 0.3 > 0.7).astype(jnp.int32)))
    for kind in (metrax.Precision, metrax.Recall, metrax.AUCROC, metrax.MSE):
        metric = metrics.Metric(kind)
        update = sf.filter_jit(lambda p, y, m=metric: m.update(predictions=p, labels=y))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            by_hand = kind.empty()
            for p, y in batches:
                update(p, y)
                by_hand = by_hand.merge(kind.from_model_output(predictions=p, labels=y))
            np.testing.assert_allclose(metric.compute(), by_hand.compute(), rtol=1e-6)


def test_a_metric_of_a_library_without_data_is_what_the_library_says():
    metrax = pytest.importorskip("metrax")
    for kind in (metrax.Precision, metrax.MSE):
        assert float(metrics.Metric(kind).compute()) == 0.0
    roc = metrics.Metric(metrax.AUCROC)
    with pytest.raises(ValueError, match="AUCROC can't be computed: it has no data"):
        roc.compute()
    roc.update(predictions=jnp.array([0.1, 0.9]), labels=jnp.array([0, 1]))
    roc.compute()
