"""Plain text to hide facts in, when none is given. Written for this; repeats as often as a length needs it."""

TEXT = """\
Once upon a time there was a small village near a wide river. The people of the village baked bread in the morning \
and sang songs in the evening. A little girl lived in the last house before the forest. She liked to walk to the \
water and look at the fish. One day she saw a bird with a broken wing. She took it home and gave it some water and a \
few crumbs. Her mother smiled and said that it would soon be able to fly again. They put the bird into a basket with \
soft straw. Every day the girl talked to the bird and told it what she had seen. After some weeks the bird jumped \
out of the basket. It flew around the room and then out of the window. The girl was sad, but she was also happy for \
the bird.

In the summer the sun was hot and the children played under the trees. They made boats from leaves and let them swim \
down the river. An old man sat on a bench and watched them. He told them about the time when he was young and worked \
on a ship. The ship was big and had three white sails. It carried apples and wool to a town far away. Once there was \
a storm and the waves were as high as a house. The sailors were afraid, but they worked together and the ship came \
safely to the land. The children listened and forgot their boats.

When autumn came, the wind took the leaves from the trees. The farmers brought the wheat into the barns. There was a \
big feast with soup and cake and music. Everyone danced until the moon was high. A dog barked at the shadows and \
made the children laugh. The next morning it rained, and all the streets were full of water. The girl put on her \
boots and jumped from one puddle to the next. Her friend came with an umbrella, but they did not need it. They were \
wet from head to foot and had to sit by the fire.

Then winter came and covered the roofs with snow. The river froze and the children learned to skate. Some of them \
fell, but they got up again and tried once more. In the evening their mothers made hot milk with honey. The old man \
told another story, and this time it was about a bear who could not sleep. The bear walked through the forest and \
asked every animal for help. The owl told him to count the stars. The fox told him to think of warm stones. In the \
end he lay down beside a brook and listened to the water, and then he slept until spring.

In spring the birds came back. One of them sat on the window of the last house and sang. The girl opened the window \
and saw a small mark on its wing. She knew at once which bird it was. It came into the room and sat on the old \
basket. From that day on it came every morning, and the girl always had some crumbs for it. The people of the \
village said that a friend is someone who comes back. And so the year went around, and another one began.
"""
