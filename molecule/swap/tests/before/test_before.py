"""Before the swap: blue is production."""


def test_blue_is_live(edge, engine):
    status = engine("status")
    assert (status["live"], status["idle"], status["rc"]) == ("blue", "green", 0)
    assert edge.predict("/predict").headers["x-model-colour"] == "blue"
    assert edge.predict("/test/predict").headers["x-model-colour"] == "green"
