"""After a refused swap: nothing has changed."""


def test_green_is_still_live(edge, engine):
    assert engine("status")["live"] == "green"
    assert edge.predict("/predict").headers["x-model-colour"] == "green"


def test_the_refusal_is_on_record(engine):
    assert engine("history")["entries"][-1]["outcome"] == "refused"
