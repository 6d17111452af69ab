/**
 * The texts that the page offers. TRANSLATIONS are sentences that the bundled model translates correctly, each with its
 * translation; the table is JSON, so that tests/serve/page/test_page_examples.py can compare it with what the model
 * says now. After another model is bundled that test names the lines to change. The first one runs when the page opens.
 */
export const TRANSLATIONS = [
  { "text": "He drank a cup of tea.", "translation": "他喝了一杯茶。" },
  { "text": "我有两个哥哥。", "translation": "I have two brothers." },
  { "text": "There are many fish in the river.", "translation": "河里有许多鱼。" },
  { "text": "他把书放在桌子上。", "translation": "He put the book on the table." },
  { "text": "Please open the door.", "translation": "请打开门。" },
  { "text": "请打开门。", "translation": "Please open the door." }
];

// What other models answer is not known here; these are only places to start.
export const EXAMPLES = {
  translate: TRANSLATIONS.map(({ text }) => text),
  complete: ['The children', '从前有一座山', '春天来了'],
  chat: ['What is a mixture of experts? Answer in one sentence.', '什么是混合专家模型？请用一句话回答。'],
};

/** The second text of a comparison, beside the first example: of the other language, and translated correctly too. */
export const SECOND = {
  translate: TRANSLATIONS[1].text,
  complete: 'The city',
  chat: 'What is a neural network? Answer in one sentence.',
};
