"""After the rollback: blue is production again."""


def test_blue_is_live(edge, engine):
    status = engine("status")
    assert (status["live"], status["previous"]) == ("blue", "green")
    assert edge.predict("/predict").headers["x-model-colour"] == "blue"
