"""sentiment.py - a reward of one's own (docs/rewards.md): how happy a text sounds, by VADER's lexicon."""
try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError:
    raise ImportError("VADER is not installed: pip install vaderSentiment") from None

analyzer = SentimentIntensityAnalyzer()


def sentiment(prompt, response):
    """The mood, from -1 to 1."""
    return analyzer.polarity_scores(response)["compound"]
